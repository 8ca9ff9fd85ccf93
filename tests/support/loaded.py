"""A checkpoint on disk beside the model that it was written from."""

from __future__ import annotations

from pathlib import Path

import torch

from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.inference.inference import load_model
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.prompt import MemoryPrompt


def check_loaded(original: CodeLLaVAModel, folder: Path, text: str) -> tuple[CodeLLaVAModel, MemoryPrompt]:
    """See that both ways of loading embed a prompt as the original does; returns the loaded model and the prompt."""
    model, _, processor = load_model(folder, device="cpu")
    assert model.config == original.config
    prompt = processor.parse_raw(text)
    compressor = Compressor.load(folder, settings=ON_CPU)
    with torch.inference_mode():
        expected = original.embed_prompt(prompt)
        torch.testing.assert_close(model.embed_prompt(prompt), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(compressor.compress([prompt])[0].values_TD, expected, atol=1e-5, rtol=0)
    return model, prompt
