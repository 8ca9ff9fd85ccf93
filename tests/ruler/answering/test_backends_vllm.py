"""RULER through a real vLLM server: memory rows are answered as the local decoder answers the same embeddings."""

from __future__ import annotations

import json

import pytest
import torch

from ruler.answering.predict import PredictJob, predict
from ruler.answering.protocol import BackendSettings, Question
from tests.ruler.conftest import make_rows
from tests.support import vllm_server
from tests.support.marks import needs_default_checkpoint
from utils.checkpoint.load import load_decoder
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.settings import ON_CPU, EncoderSettings
from utils.compress.compressor import Compressor

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_text_and_memory_of_the_same_rows(make_dataset, tmp_path):
    pytest.importorskip("openai")
    needs_default_checkpoint()
    data = make_dataset(tasks=("vt",), count=3)
    files = find_checkpoint(None, 8)
    with vllm_server.running(files.decoder, tmp_path / "server.log", name="smollm2") as url:
        for name in ("server-text", "server-memory"):
            settings = BackendSettings(name=name, server_url=url, chunk_size=8 if name == "server-memory" else None)
            (outcome,) = predict(PredictJob(data_dir=data, output_dir=tmp_path / name), settings)
            assert (outcome.answered, outcome.failed) == (3, 0)
    text, memory = (
        [json.loads(line) for line in (tmp_path / name / "1024/vt.jsonl").read_text().splitlines()]
        for name in ("server-text", "server-memory")
    )
    compressor = Compressor.load(None, settings=ON_CPU, chunk_size=8)
    tokenizer = compressor.processor.tokenizers.decoder
    decoder = load_decoder(files, EncoderSettings(device="cpu", dtype="float32")).eval()
    for row, asked, answered in zip(make_rows("vt", 3), text, memory, strict=True):
        fields = {name: row[name] for name in ("input", "answer_prefix", "context_start", "context_end")}
        question = Question(**fields, max_tokens=30)
        assert asked["others"]["prompt_tokens"] == len(tokenizer(question.text)["input_ids"])
        (embeds,) = compressor.compress([compressor.parse_raw(question.memory_text)])
        with torch.inference_mode():
            ids = decoder.generate(inputs_embeds=embeds.values_TD[None].float(), max_new_tokens=30, do_sample=False)
        assert answered["pred"] == tokenizer.decode(ids[0], skip_special_tokens=True)
        assert answered["others"]["num_latents"] == embeds.stats.num_latents
