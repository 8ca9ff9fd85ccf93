"""The weights of a checkpoint, each part on its own, so that a job loads only what it needs.

    files = find_checkpoint(path)
    tokenizers = load_tokenizers(files)
    encoder = load_memory_encoder(files, settings)          # encoder and adapter
    table = load_embedding_table(files)                     # the decoder's embeddings, memory-mapped
    decoder = load_decoder(files, settings)

LoRA folders (`adapter_model.safetensors`) are merged into their base. Every tensor is checked against the configuration
before use.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from utils.checkpoint.layout import CheckpointFiles, check_size
from utils.checkpoint.lora import base_or_self, is_peft_folder, merge_lora
from utils.checkpoint.settings import AS_STORED, AUTOMATIC, DTYPE_NAMES, EncoderSettings
from utils.checkpoint.weight_files import weight_files
from utils.errors import CheckpointError, ConfigError
from utils.model.adapter import Adapter
from utils.model.code_chunker import CodeChunker
from utils.model.code_llava_model import MemoryEncoder
from utils.model.limits import explain_out_of_memory
from utils.model.prompt import PromptTokenizers
from utils.pretrained import (
    CONFIG,
    TOKENIZER_CONFIG,
    loading,
    read_model,
    read_tokenizer,
    without_progress_bars,
)

logger = logging.getLogger(__name__)

# How transformers' families name the input embedding table.
_TABLE_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# A tied table may be stored under the output head's name alone.
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
# Families whose embedding layer does more than look a row up: the table alone is not enough for them.
_SCALED_EMBEDDINGS = ("gemma",)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a device that is there.

    Raises:
        ConfigError: CUDA was asked for but this machine or this torch has none.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device}: expected auto, cpu, cuda or cuda:<number>") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ConfigError(f"--device {device}: {count} CUDA devices are visible; use --device cpu or auto")
    return chosen


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Turn a name such as "float32" into a dtype; None where it depends on the weights: "auto" and "stored".

    Raises:
        ConfigError: An unknown name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"--dtype {dtype}: expected {', '.join(DTYPE_NAMES)}")
    return None if dtype in ("auto", "stored") else getattr(torch, dtype)


def has_native_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; where it has none, float32 is several times as fast."""
    # Not in every build of torch.
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())


def in_fast_dtype(model: Any, device: torch.device) -> Any:
    """What "auto" makes of a model that was loaded as stored, for the device it goes to."""
    if device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float16) or has_native_bfloat16():
        return model
    _tell_of_float32()
    return model.float()


@functools.cache
def _tell_of_float32() -> None:
    """Once is enough."""
    logger.info("this CPU has no bfloat16 of its own: float32 is used, which is faster here (--dtype says otherwise)")


def load_tokenizers(files: CheckpointFiles) -> PromptTokenizers:
    """Load both tokenizers and look up the marker tokens.

    Raises:
        CheckpointError: A tokenizer cannot be read, or the decoder's lacks a marker.
    """
    return PromptTokenizers(decoder=read_tokenizer(files.decoder), encoder=read_tokenizer(files.encoder))


def load_memory_encoder(
    files: CheckpointFiles, settings: EncoderSettings = AUTOMATIC, *, tokenizer: Any = None
) -> MemoryEncoder:
    """Load encoder and adapter.

    Args:
        files: The checkpoint.
        settings: Where and how they run.
        tokenizer: The encoder's tokenizer; None: loaded.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape than the configurations say.
        ConfigError: The device is not there, or the dtype unknown.
    """
    target = resolve_device(settings.device)
    encoder = _load_model(AutoModel, files.encoder, settings, target)
    _round_rotary_frequencies(encoder, getattr(torch, files.config.rope_dtype))
    tokenizer = tokenizer or read_tokenizer(files.encoder)
    check_vocabulary(tokenizer, encoder.get_input_embeddings().weight, files.encoder)
    if files.config.pooling == "eos" and tokenizer.pad_token_id is None:
        raise CheckpointError(f"{files.encoder / TOKENIZER_CONFIG}: pad_token is missing, which eos pooling needs")
    chunker = CodeChunker(
        encoder,
        files.config,
        pad_token_id=tokenizer.pad_token_id,
        packed=settings.attn_implementation is None,
        batch_tokens=settings.batch_tokens,
        compiled=settings.compiled,
        tokenizer=tokenizer,
    )
    adapter = _load_adapter(files, chunker, encoder.dtype)
    with explain_out_of_memory(f"loading the encoder to {target}", "use another --device"):
        return MemoryEncoder(chunker, adapter).to(target).eval()


def load_decoder(files: CheckpointFiles, settings: EncoderSettings = AUTOMATIC) -> Any:
    """Load the decoder, a Hugging Face causal language model.

    Raises:
        CheckpointError: A tensor is missing or of another shape than the configuration says.
        ConfigError: The device is not there, or the dtype unknown.
    """
    target = resolve_device(settings.device)
    model = _load_model(AutoModelForCausalLM, files.decoder, settings, target)
    with explain_out_of_memory(f"loading the decoder to {target}", "use another --device"):
        return model.to(target).eval()


def load_embedding_table(files: CheckpointFiles) -> torch.Tensor:
    """Load the decoder's input embedding table [vocabulary, D] on the CPU and nothing else of the decoder.

    The table stays memory-mapped in its stored dtype: only the rows that are looked up become resident. That of a LoRA
    folder, which training may have resized, is loaded with its whole base.

    Raises:
        CheckpointError: There is none, or it cannot stand alone because the model scales what it looks up.
    """
    if is_peft_folder(files.decoder):
        logger.info("%s holds LoRA weights: loading the base model for its embedding table", files.decoder)
        return load_decoder(files, AS_STORED).get_input_embeddings().weight.detach()
    config = files.decoder_config
    if str(config.model_type).startswith(_SCALED_EMBEDDINGS):
        raise CheckpointError(
            f"{files.decoder}: the embeddings of {config.model_type} models are scaled as they are looked up, which "
            "compressing without the decoder does not do; generate with `python -m utils.inference.inference` instead"
        )
    places = {n: p for n, p in files.decoder_tensors.items() if n.endswith(_TABLE_NAMES)}
    if not places and getattr(config, "tie_word_embeddings", False):
        places = {n: p for n, p in files.decoder_tensors.items() if n.endswith(_HEAD_NAMES)}
    if len(places) != 1:
        raise CheckpointError(f"{files.decoder}: expected one input embedding table, found {sorted(places) or 'none'}")
    name, path = next(iter(places.items()))
    with loading(path, "cannot be read"), safe_open(path, framework="pt") as file:
        table = file.get_tensor(name)
    _check_dtype(table.dtype, path)
    if table.ndim != 2 or table.shape[1] != config.hidden_size or table.shape[0] < config.vocab_size:
        expected = [config.vocab_size, config.hidden_size]
        raise CheckpointError(f"{path}: {name}: expected shape {expected}, got {list(table.shape)}")
    return table


def check_vocabulary(tokenizer: Any, table_VD: torch.Tensor, folder: Path) -> None:
    """Refuse a tokenizer that can write ids which the embedding table has no row for.

    Raises:
        CheckpointError: Names the folder, the tokens and the rows.
    """
    if len(tokenizer) > table_VD.shape[0]:
        raise CheckpointError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens but its embedding table {table_VD.shape[0]} rows: "
            "resize the model's embeddings to the tokenizer and save it again"
        )


def resize_table(model: Any, num_tokens: int) -> None:
    """Give a model's embedding table at least `num_tokens` rows; new rows are the mean of the old ones.

    transformers draws new rows at random, which would make two loads of one checkpoint differ.
    """
    table = model.get_input_embeddings().weight
    old = table.shape[0]
    if num_tokens <= old:
        return
    mean = table.detach().float().mean(dim=0)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in {id(x): x for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x}.values():
            layer.weight[old:] = mean.to(layer.weight.dtype)


def _load_model(kind: Any, folder: Path, settings: EncoderSettings, target: torch.device) -> Any:
    peft, base = is_peft_folder(folder), base_or_self(folder)
    dtype = resolve_dtype(settings.dtype)
    read = functools.partial(
        read_model, name=base, dtype=dtype or "auto", attn_implementation=settings.attn_implementation
    )
    if peft:
        # Those of any other folder were checked when it was found.
        weight_files(base)
    with without_progress_bars():
        model, report = read(kind)
        lost = [name for name in report["missing_keys"] if name.endswith(_TABLE_NAMES)]
        if kind is AutoModel and lost and getattr(model.config, "tie_word_embeddings", False):
            # A model without a head does not find its table under the head's name.
            whole, report = read(AutoModelForCausalLM)
            model = whole.base_model
    check_report(report, base)
    _check_dtype(model.dtype, base)
    check_size(model.config, "hidden_size", base)
    if peft:
        resize_table(model, len(read_tokenizer(folder)))
        model = merge_lora(model, folder)
    return in_fast_dtype(model, target) if settings.dtype in (None, "auto") else model


def _check_dtype(dtype: torch.dtype, path: Path) -> None:
    # Below two bytes a number torch can store, but not compute with.
    if not dtype.is_floating_point or dtype.itemsize < 2:
        names = ", ".join(DTYPE_NAMES[2:])
        raise CheckpointError(f"{path}: its weights are {dtype}: save them as one of {names}, or pass --dtype")


def check_report(report: dict[str, Any], folder: Path) -> None:
    """Refuse weights and a configuration that are not of one model.

    Args:
        report: What `read_model` gave.
        folder: For the message.

    Raises:
        CheckpointError: Names the first tensor that is missing, unknown or of another shape.
    """
    # A pooler on top of an encoder is never used here; checkpoints often lack it.
    missing = sorted(name for name in report["missing_keys"] if "pooler." not in name)
    mismatched = sorted(report["mismatched_keys"])
    # A head that is not used is no loss; a layer that is not used means weights and configuration disagree.
    unused = sorted(name for name in report["unexpected_keys"] if "layer" in name)
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is missing from the weights ({len(missing)} missing in all)")
    if unused:
        raise CheckpointError(f"{folder}: config.json has no place for {unused[0]} ({len(unused)} such weights in all)")
    if mismatched:
        name, got, expected = mismatched[0]
        raise CheckpointError(f"{folder}: {name}: expected shape {list(expected)}, got {list(got)}")


def _round_rotary_frequencies(encoder: Any, dtype: torch.dtype) -> None:
    for module in encoder.modules():
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.inv_freq = module.inv_freq.to(dtype).float()


def _load_adapter(files: CheckpointFiles, chunker: CodeChunker, dtype: torch.dtype) -> Adapter:
    state: dict[str, torch.Tensor] = {}
    parts = files.layout.adapter_files(files.config)
    for name, renamed in parts.items():
        path = files.root / name
        with loading(path, "cannot be read"):
            tensors = load_file(path)
        if renamed and set(tensors) != set(renamed):
            raise CheckpointError(f"{path}: expected the keys {sorted(renamed)}, got {sorted(tensors)}")
        state |= {renamed.get(key, key): value for key, value in tensors.items()}
    where = " and ".join(str(files.root / name) for name in parts)
    for key in ("fc1.weight", "fc2.weight"):
        if key not in state or state[key].ndim != 2 or not state[key].numel():
            raise CheckpointError(f"{where}: {key} is missing or is not a matrix")
    # Compared before they are built: a configuration may ask for any number of layers.
    layers = len({key.split(".")[1] for key in state if key.startswith("attention_layers.")})
    if layers != (wanted := files.config.num_adapter_layers):
        raise CheckpointError(f"{where}: expected {wanted} attention layers (num_adapter_layers), got {layers}")
    decoder_config = files.decoder_config
    layer_config, source = decoder_config, files.decoder
    if files.config.adapter == "attn_mlp":
        layer_config, source = chunker.encoder.config, files.encoder
    sizes: dict[str, Any] = {"middle_width": state["fc1.weight"].shape[0], "layer_config": layer_config}
    sizes["token_width"] = chunker.token_width
    with loading(source / CONFIG, "describes no layers that an adapter can be built of"), torch.device("meta"):
        shapes = Adapter(chunker.width, decoder_config.hidden_size, config=files.config, **sizes).state_dict()
    _check_state(state, shapes, where)
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {key}: expected floating-point numbers, got {tensor.dtype}")
    adapter = Adapter(chunker.width, decoder_config.hidden_size, config=files.config, **sizes)
    adapter.load_state_dict(state)
    # The parameters only: rotary frequencies stay in float32.
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(dtype)
    return adapter


def _check_state(state: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Compare tensor names and shapes with those of a module; the first difference is named, the others counted."""
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    shapes = {name: (list(expected[name].shape), list(state[name].shape)) for name in expected if name in state}
    problems += [f"{name}: expected shape {want}, got {got}" for name, (want, got) in shapes.items() if want != got]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{where}: {problems[0]}{more}")
