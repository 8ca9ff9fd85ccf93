"""torch.distributed checkpoints without trust: their `.metadata` is a pickle, of which only plain classes are accepted.

load(state, storage_reader=SafeReader(folder), no_dist=True)

torch itself reads the tensors with `weights_only=True`, but unpickles the table of contents as it comes.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

# What torch writes into a table of contents, dtypes aside; none of it does anything when it is made.
_ACCEPTED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
}


class MetadataError(Exception):
    """A table of contents that is damaged or holds something else."""


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint folders, with a table of contents that may come from anywhere."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the table of contents.

        Raises:
            MetadataError: It holds anything that torch does not write, or is damaged.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            try:
                metadata = _Unpickler(stream).load()
            except MetadataError:
                raise
            except Exception as error:  # a damaged pickle fails in every way there is
                raise MetadataError(f"it is damaged or half copied ({type(error).__name__})") from None
        if not isinstance(metadata, Metadata):
            raise MetadataError(f"expected a checkpoint's table of contents, got {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ACCEPTED.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        ):
            return super().find_class(module, name)
        raise MetadataError(f"it holds {module}.{name}, which no checkpoint needs: it is not read")
