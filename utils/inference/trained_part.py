"""The trained part of a pair – adapter, marker rows, encoder and decoder or their LoRA – and its merging into the pair.

    part = TrainedPart.open(folder)                    # trained.json and its safetensors files
    unused = merge_trained_state(model, part.tensors(), part.lora_scales, marker_ids)

Names are those of `CodeLLaVAModel`'s parameters; LoRA pairs stand in place of the matrix they change, as peft names
them. `utils.training.pack` writes the folder, the default checkpoint's assembly reads it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import CheckpointError, DatasetError
from utils.files import sha256_bytes, sha256_file, write_text
from utils.pretrained import loading, read_settings

if TYPE_CHECKING:
    import torch

MANIFEST = "trained.json"
CARD = "README.md"
MARKER_DELTA = "marker_rows.delta"
_LORA_A = re.compile(r"(?P<layer>.+)\.lora_A\.\w+\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPart:
    """A folder with a trained part.

    Attributes:
        folder: Where it is.
        manifest: Its `trained.json`: files with their sha256, LoRA scales, chunk sizes, where it came from.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> TrainedPart:
        """Open a folder.

        Raises:
            DatasetError: There is no manifest.
            CheckpointError: It cannot be used, or a file of it is missing or damaged.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise DatasetError(f"{folder / MANIFEST} does not exist: give the folder of a trained part")
        manifest = read_settings(folder / MANIFEST)
        _check_manifest(manifest, folder / MANIFEST)
        for name, digest in manifest["files"].items():
            # Unlike Path.is_file, this takes any text.
            if not os.path.isfile(folder / name) or sha256_file(folder / name) != digest:  # noqa: PTH113
                raise CheckpointError(f"{folder / name} is missing or damaged: restore it from the repository")
        return cls(folder=folder, manifest=manifest)

    @property
    def lora_scales(self) -> dict[str, float]:
        """Prefix of parameter names → LoRA scale."""
        return dict(self.manifest["lora_scales"])

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Chunk sizes that it was trained for."""
        return tuple(self.manifest["chunk_sizes"])

    @property
    def fingerprint(self) -> str:
        """Changes with any of its files."""
        return sha256_bytes((self.folder / MANIFEST).read_bytes())

    @property
    def history(self) -> dict[str, Any]:
        """What a run that goes on from it remembers: `fingerprint`, `run`, `config`, as JSON values."""
        return {"fingerprint": self.fingerprint, "run": self.manifest["run"], "config": self.manifest["config"]}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, by name."""
        from safetensors.torch import load_file

        tensors: dict[str, torch.Tensor] = {}
        for file in self.manifest["files"]:
            with loading(self.folder / file, "cannot be read"):
                tensors |= load_file(self.folder / file)
        return tensors


def _check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    files, scales, sizes = (manifest.get(key) for key in ("files", "lora_scales", "chunk_sizes"))
    # A name that leads elsewhere is not a part of the folder.
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise CheckpointError(f"{path}: files: expected names of files beside it with their sha256, got {files!r:.100}")
    if not isinstance(scales, dict) or any(type(scale) not in (int, float) for scale in scales.values()):
        raise CheckpointError(f"{path}: lora_scales: expected numbers by prefix, got {scales!r:.100}")
    if not isinstance(sizes, list) or any(type(size) is not int or size < 1 for size in sizes):
        raise CheckpointError(f"{path}: chunk_sizes: expected a list of whole numbers, got {sizes!r:.100}")
    for key in ("run", "config"):
        if not isinstance(manifest.get(key), dict):
            raise CheckpointError(f"{path}: {key}: expected an object, got {manifest.get(key)!r:.100}")


def merge_trained_state(
    model: Any,
    state: Mapping[str, torch.Tensor],
    lora_scales: Mapping[str, float],
    marker_ids: Sequence[int],
) -> set[str]:
    """Write a trained state into a pair, in the pair's own dtype.

    Args:
        model: A `CodeLLaVAModel`, or any module with the same names; changed in place.
        state: Trained tensors.
        lora_scales: Prefix of parameter names → what B·A is multiplied with before it is added.
        marker_ids: Rows of the decoder's table that `MARKER_DELTA` is added to.

    Returns:
        Names that the module has no place for.

    Raises:
        CheckpointError: A tensor of another shape, or a LoRA matrix without its other half or its scale.
    """
    import torch

    parameters = dict(model.named_parameters(remove_duplicate=False))
    unused = set()
    with torch.no_grad():
        for name, tensor in state.items():
            if name == MARKER_DELTA or ".lora_B." in name:
                continue
            lora = _LORA_A.fullmatch(name)
            target = parameters.get(f"{lora['layer']}.weight" if lora else name)
            if target is None:
                unused.add(name)
                continue
            value = tensor.to(target.device).float()
            if lora:
                scale = next((s for prefix, s in lora_scales.items() if name.startswith(prefix)), None)
                b = state.get(name.replace(".lora_A.", ".lora_B."))
                if scale is None or b is None:
                    lacking = "scale" if scale is None else "lora_B"
                    raise CheckpointError(f"trained tensor {name}: its {lacking} is missing")
                rank = next(iter(value.shape), 0)
                if list(b.shape) != [target.shape[0], rank] or list(value.shape) != [rank, target.shape[-1]]:
                    raise CheckpointError(
                        f"trained tensor {name}: LoRA of shapes {list(b.shape)} and {list(value.shape)} does not fit a "
                        f"matrix of shape {list(target.shape)}"
                    )
                # The state may also hold the matrix that it changes, as whole-model states do.
                value = state.get(f"{lora['layer']}.weight", target).to(value) + scale * (b.to(value) @ value)
            elif f"{name.removesuffix('.weight')}.lora_A.default.weight" in state:
                continue
            if value.shape != target.shape:
                expected, got = list(target.shape), list(value.shape)
                raise CheckpointError(f"trained tensor {name}: expected shape {expected}, got {got}")
            target.copy_(value)
        # Last, for the table itself may be part of the state.
        if MARKER_DELTA in state:
            table = model.decoder.get_input_embeddings().weight
            if (got := list(state[MARKER_DELTA].shape)) != [len(marker_ids), table.shape[1]]:
                expected = [len(marker_ids), table.shape[1]]
                raise CheckpointError(f"trained tensor {MARKER_DELTA}: expected shape {expected}, got {got}")
            for row, marker in zip(state[MARKER_DELTA], marker_ids, strict=True):
                table[marker] += row.to(table)
    return unused


def merge_into_checkpoint(folder: Path, part: TrainedPart) -> None:
    """Merge a trained part into an assembled checkpoint folder, which must not be in use yet.

    Raises:
        CheckpointError: The part belongs to another pair.
    """
    from utils.inference.inference import load_model
    from utils.inference.saving import save_checkpoint

    model, _, processor = load_model(folder, device="cpu")
    markers = processor.tokenizers.markers
    unused = merge_trained_state(model, part.tensors(), part.lora_scales, (markers.start, markers.end))
    if unused:
        raise CheckpointError(f"{part.folder}: {min(unused)} has no place in the default checkpoint")
    model.code_chunker.config = dataclasses.replace(model.config, chunk_sizes=part.chunk_sizes)
    save_checkpoint(folder / "merged", model, processor.tokenizers)
    for path in (folder / "merged").iterdir():
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    (folder / "merged").rmdir()
    card = part.folder / CARD
    if card.is_file():
        write_text(folder / CARD, card.read_text(encoding="utf-8"))
