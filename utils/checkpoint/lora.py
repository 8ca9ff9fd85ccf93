"""LoRA folders: the base model they stand on, and their weights merged into it.

`peft` places and merges them. It fills what a folder lacks with fresh weights and passes over what it does not know,
so both are compared here.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from utils.errors import CheckpointError
from utils.pretrained import ADAPTER_CONFIG, loading, read_settings

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds LoRA weights on top of a base model."""
    return (folder / ADAPTER_WEIGHTS).is_file()


def base_or_self(folder: Path) -> Path:
    """Where the whole model of a folder lies: in the base of a LoRA folder, else in the folder itself."""
    return base_of(folder) if is_peft_folder(folder) else folder


def base_of(folder: Path) -> Path:
    """Folder of the base model that a LoRA folder stands on; only the user himself may have one fetched.

    Raises:
        CheckpointError: The LoRA folder does not say, or its base is not on this machine.
    """
    path = folder / ADAPTER_CONFIG
    base = read_settings(path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(
            f"{path}: base_model_name_or_path: expected a folder, got {base!r:.60}: the LoRA weights do not say their "
            "base"
        )
    # A relative base is meant from the LoRA folder.
    for place in (folder / base, Path(base)):
        # Unlike Path.is_dir, this takes any text.
        if os.path.isdir(place):  # noqa: PTH112
            if is_peft_folder(place):
                raise CheckpointError(f"{path}: base_model_name_or_path: {place} holds LoRA weights itself")
            return place
    way = "put its folder there"
    if HUB_ID.fullmatch(base):
        local = f"bases/{base.rpartition('/')[2]}"
        way = f"fetch it (hf download {base} --local-dir {local}) and put that folder's path there"
    raise CheckpointError(
        f"{path}: base_model_name_or_path: {base!r:.200} is no folder on this machine, and nothing is fetched that you "
        f"did not ask for: {way}"
    )


def merge_lora(model: Any, folder: Path) -> Any:
    """Merge a LoRA folder into its base model.

    Args:
        model: The base; changed in place.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The merged model.

    Raises:
        CheckpointError: The folder is no LoRA, or its tensors are not those that its configuration and base call for.
    """
    from peft import PeftModel, get_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS
    with loading(path, "cannot be read"), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        stored = {name: tensor.get_shape() for name, tensor in slices.items()}
        whole = sorted(name for name, tensor in slices.items() if "F" not in tensor.get_dtype())
    if whole:
        raise CheckpointError(f"{path}: {whole[0]}: expected floating-point numbers ({len(whole)} such tensors in all)")
    _check_settings(read_settings(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG, stored)
    with loading(folder, "holds LoRA weights that do not fit their base"), warnings.catch_warnings():
        # What they say of missing tensors is an error below.
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(model, folder, local_files_only=True)
        # Without "auto", which asks the hub what the base's vocabulary was.
        expected = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys()
        # Whole layers, such as a resized table, are saved under their own names.
        known = expected | tuned.state_dict().keys()
    missing, unknown = sorted(expected - stored.keys()), sorted(stored.keys() - known)
    counts = f"{len(missing)} of {len(expected)} missing, {len(unknown)} unknown"
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing ({counts}): train or copy the LoRA weights again")
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0]} has no place in the base ({counts}): is it another model's?")
    with loading(folder, "holds LoRA weights that cannot be merged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuned.merge_and_unload()


def _check_settings(settings: dict[str, Any], path: Path, stored: dict[str, list[int]]) -> None:
    """Refuse what is no LoRA, and ranks that the stored tensors do not have: peft would allocate them."""
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type: expected 'LORA', got {settings.get('peft_type')!r:.60}")
    largest = max((size for shape in stored.values() for size in shape), default=0)
    patterns = settings.get("rank_pattern")
    ranks = [settings.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    for rank in ranks:
        if type(rank) is not int or not 1 <= rank <= max(largest, 1024):
            raise CheckpointError(f"{path}: rank {rank!r:.60}: expected a whole number from 1 to {max(largest, 1024)}")
