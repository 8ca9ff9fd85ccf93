"""torch.distributed checkpoints without trust: their `.metadata` is a pickle, of which only plain classes are accepted.

    load(state, storage_reader=SafeReader(folder), no_dist=True)

torch reads the tensors with `weights_only=True`, but unpickles the table of contents as it comes; its own restricted
unpickler does not know the pickle protocol that the table is written in.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from utils.errors import CheckpointError
from utils.pretrained import loading

_METADATA = "torch.distributed.checkpoint.metadata."
# What torch writes into a table of contents, dtypes aside; none of it does anything when it is made.
_ACCEPTED = {
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(_METADATA + name for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *(_METADATA + name for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
    _METADATA + "_MEM_FORMAT_ENCODING",
    "collections.OrderedDict",
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("", "Posix", "Windows")),
}


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint folders, with a table of contents that may come from anywhere."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the table of contents.

        Raises:
            CheckpointError: It holds anything that torch does not write, or is damaged.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with loading(path, "is damaged, half copied or untrusted"), self.fs.create_stream(path, "rb") as stream:
            metadata = _Unpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: expected a checkpoint's table of contents, got {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in _ACCEPTED:
            return super().find_class(module, name)
        raise ValueError(f"it holds {module}.{name}, which no checkpoint needs and which is never loaded")
