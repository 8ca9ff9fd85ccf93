"""Turn what trainers write into a checkpoint, and one layout into the other.

    convert("runs/pair/checkpoint_3", "pairs/new", base="pairs/start")      # DeepSpeed, FSDP, .bin, safetensors
    convert("pairs/new", "pairs/new-lclm", layout=LCLM)                      # a checkpoint in the other layout

A trainer's state is tensors only; `base`, the checkpoint that training started from, gives configurations and
tokenizers. Every tensor of the state must have its place in the pair, and every parameter of the pair its tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from utils.checkpoint.convert.merge import put_state
from utils.checkpoint.convert.states import BIN, StateFiles, find_state, read_state
from utils.checkpoint.layout import LAYOUTS, Layout, newest_child
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.lora import ADAPTER_WEIGHTS
from utils.checkpoint.pair import load_pair
from utils.checkpoint.save import save_checkpoint
from utils.checkpoint.settings import AS_STORED, StateOptions
from utils.errors import CheckpointError
from utils.files import check_name, refuse_overwriting_inputs
from utils.pretrained import without_progress_bars

_BIN_PARTS = {
    "pytorch_model.bin": "model.safetensors",
    "pytorch_model.bin.index.json": "model.safetensors",
    "adapter_model.bin": ADAPTER_WEIGHTS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did.

    Attributes:
        output: The checkpoint that it wrote.
        layout: Its layout's name.
        source: What was read.
        format: "checkpoint", or the format of a trainer's state.
        tensors: Tensors read from a state; 0 for a checkpoint.
        lora_layers: Layers that a LoRA pair of the state was merged into.
        from_base: Parameters that the state lacks and the base gave.
    """

    output: str
    layout: str
    source: str
    format: str = "checkpoint"
    tensors: int = 0
    lora_layers: int = 0
    from_base: int = 0


def convert(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    layout: Layout = LAYOUTS[0],
    dtype: str | None = None,
    chunk_size: int | None = None,
    options: StateOptions | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write a checkpoint from a trainer's state or from another checkpoint.

    Args:
        source: A trainer's folder or weight file; without `base` a checkpoint, its parts in safetensors or `.bin`.
        output: The new checkpoint's folder; it appears whole or not at all.
        base: Checkpoint that the training started from: its configurations and tokenizers are taken.
        layout: The layout to write.
        dtype: "float32", "bfloat16", "float16"; None: as the base (the source, without one) is stored.
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.
        options: How a state is read; needs `base`.
        overwrite: Replace an existing output.

    Raises:
        CheckpointError: The source cannot be read or does not fit the base, or the output exists.
        ConfigError: The checkpoint cannot serve the chunk size, or does not say its own and none was given; or the
            output would replace the source or the base.
    """
    _check_output(Path(output), source, base, overwrite)
    result = Conversion(output=str(output), layout=layout.name, source=str(source))
    if base is None:
        _check_is_checkpoint(source)
    with _with_safetensors(source if base is None else base, Path(output)) as root:
        # What is fast on this machine is nothing for a file.
        settings = AS_STORED if dtype in (None, "auto") else dataclasses.replace(AS_STORED, dtype=dtype)
        model, tokenizers = load_pair(find_checkpoint(root, chunk_size), settings)
        if base is not None:
            options = options or StateOptions()
            found = find_state(source, options.format)
            counts = put_state(model, found, (tokenizers.markers.start, tokenizers.markers.end), options)
            result = dataclasses.replace(result, source=str(found.path), format=found.format, **counts)
        with without_progress_bars():
            save_checkpoint(output, model, tokenizers, layout)
    return result


def _check_output(output: Path, source: str | Path, base: str | Path | None, overwrite: bool) -> None:
    check_name(output)
    if output.exists():
        refuse_overwriting_inputs({"output": output}, {"source": source, "--base": base})
        if not overwrite:
            raise CheckpointError(f"{output} exists: choose another folder, or pass --overwrite to replace it")


def _check_is_checkpoint(source: str | Path) -> None:
    """A trainer's state cannot stand alone: say what it needs rather than which folders it lacks."""
    folder = newest_child(Path(source))
    if not folder.exists() or any((folder / layout.decoder).is_dir() for layout in LAYOUTS):
        return
    found = find_state(source)
    raise CheckpointError(
        f"{found.path} is a {found.format} state: tensors without configurations and tokenizers. Pass --base with the "
        "checkpoint that training started from"
    )


@contextlib.contextmanager
def _with_safetensors(root: str | Path, output: Path) -> Iterator[str | Path]:
    """A checkpoint as it is, or a passing copy of it whose parts in `.bin` files have become safetensors."""
    folder = newest_child(Path(root))
    old = [
        folder / part / name
        for layout in LAYOUTS
        for part in (layout.decoder, layout.encoder)
        for name, new in _BIN_PARTS.items()
        if (folder / part / name).is_file() and not any((folder / part).glob(f"{Path(new).stem}*.safetensors"))
    ]
    if not old:
        yield root
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent) as temporary:
        copy = Path(temporary) / folder.name
        rewritten = {str(file.parent) for file in old}
        shutil.copytree(folder, copy, ignore=lambda at, names: [n for n in names if at in rewritten and ".bin" in n])
        for file in old:
            state = read_state(StateFiles(format=BIN, path=file))
            # Tied tensors share their memory, which safetensors does not store.
            tensors = {name: tensor.clone().contiguous() for name, tensor in state.items()}
            save_file(tensors, copy / file.parent.name / _BIN_PARTS[file.name], metadata={"format": "pt"})
        yield copy
