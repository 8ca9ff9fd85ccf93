"""Latents on disk, found by their content: the same window of the same text is encoded once.

    cache = LatentCache.open()
    key = window_key(namespace, left=[], core=token_ids, right=[])
    (latents,) = cache.get_many([key])           # None, or a bit-identical copy of what was put
    cache.put_many([key], [latents])

A key names everything the latents depend on: the namespace (a fingerprint of encoder and adapter weights, their
configuration and the chunk size) and the window's token ids with its overlap context. A value carries a checksum; an
entry that fails it is a miss, is removed, counted and reported. A cache that cannot be written (disk full, …) warns
once and caches nothing; it never fails a compression and never returns a wrong row.

As a command: `python -m utils.compress.latent_cache show`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import logging
import os
import re
import struct
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import EXIT_FAILED_ROWS, EXIT_OK, make_parser, print_json, run_command
from utils.compress.latent_files import LatentFiles
from utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from utils.model.prompt import TokenIds

logger = logging.getLogger(__name__)

CACHE_DIR_VARIABLE = "CODE_LLAVA_CACHE_DIR"
DEFAULT_LIMIT_BYTES = 4 << 30

_DEFAULT_DIR = "~/.cache/code-llava/latents"
_HEADER = struct.Struct("<B3xIII")  # dtype, latents, width, checksum; 16 bytes keep the rows aligned
_DTYPES = ("float32", "bfloat16", "float16")  # the position is the code on disk
_KEY_BYTES = 32
# What is wrong with this process or machine now, not with an entry.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.ESTALE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """The cache on disk (sizes in whole blocks), and what this `LatentCache` met.

    `corrupt` entries were not what had been written; they are misses, too.
    """

    path: str
    num_entries: int
    size_bytes: int
    hits: int
    misses: int
    corrupt: int


def default_cache_dir() -> Path:
    """`$CODE_LLAVA_CACHE_DIR`, else `~/.cache/code-llava/latents`.

    Raises:
        ConfigError: There is no home folder.
    """
    folder = Path(os.environ.get(CACHE_DIR_VARIABLE) or _DEFAULT_DIR)
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"the latent cache {folder}: {error}: name another one with ${CACHE_DIR_VARIABLE}") from None


def window_key(namespace: bytes, left: TokenIds, core: TokenIds, right: TokenIds) -> bytes:
    """Key of one encoder window, 32 bytes.

    Args:
        namespace: Fingerprint of all that turns ids into latents.
        left: Encoder ids of the overlap before the window.
        core: The window's own ids.
        right: Ids of the overlap after it.
    """
    lengths = struct.pack("<4I", len(namespace), len(left), len(core), len(right))
    digest = hashlib.blake2b(lengths + namespace, digest_size=_KEY_BYTES)
    for ids in (left, core, right):
        digest.update(array("I", ids))
    return digest.digest()


class LatentCache:
    """A content-addressed store of latents; safe for many threads and processes, and across a fork."""

    def __init__(self, files: LatentFiles, strict: bool = False) -> None:
        self._files = files
        self._strict = strict
        self._hits = self._misses = self._corrupt = 0
        self._warned: set[str] = set()

    @classmethod
    def open(
        cls, path: str | Path | None = None, size_limit_bytes: int = DEFAULT_LIMIT_BYTES, *, strict: bool = False
    ) -> LatentCache:
        """Open or make the cache.

        Args:
            path: Cache folder; `default_cache_dir()` without it.
            size_limit_bytes: Entries beyond it evict those used longest ago.
            strict: Latents that cannot be stored are a `ConfigError`, for a job whose result the cache is.

        Raises:
            ConfigError: The folder cannot be used, other users can write into it, or the limit is below 1.
        """
        if size_limit_bytes < 1:
            raise ConfigError(f"cache size limit is {size_limit_bytes} bytes, expected at least 1")
        folder = Path(path) if path is not None else default_cache_dir()
        try:
            return cls(LatentFiles(folder, size_limit_bytes), strict)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the latent cache {folder} cannot be used: {error}: name another folder with --cache-dir or "
                f"${CACHE_DIR_VARIABLE}, or go without it: --no-cache"
            ) from None

    @classmethod
    def open_if_usable(cls, path: str | Path | None = None) -> LatentCache | None:
        """Open the cache for work that it only makes faster: one warning and None where it cannot be used."""
        try:
            return cls.open(path)
        except ConfigError as error:
            logger.warning("%s; encoding without it", error)
            return None

    def __enter__(self) -> LatentCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays open between two calls, so this does nothing."""

    def get_many(self, keys: Sequence[bytes]) -> list[torch.Tensor | None]:
        """Latents [n, D] on the CPU in the dtype they were put with, one per key; None for a miss."""
        found = [self._get(key) for key in keys]
        misses = sum(latents is None for latents in found)
        self._hits += len(keys) - misses
        self._misses += misses
        return found

    def put_many(self, keys: Sequence[bytes], latents: Sequence[torch.Tensor]) -> None:
        """Add latents, one tensor [n, D] of a float dtype a key; a key that is there keeps its rows."""
        entries = {key: _encode(key, rows) for key, rows in zip(keys, latents, strict=True)}
        try:
            left_out = self._files.write(entries)
        except OSError as error:
            self._not_stored("the latent cache %s cannot be written (%s): not caching", self._files.root, error)
            return
        if left_out:
            limit = self._files.limit_bytes
            message = "%d of %d windows were not cached: together they pass the limit of %d bytes"
            self._not_stored(message, left_out, len(entries), limit)

    def stats(self) -> CacheStats:
        """State and counters."""
        sizes = [entry.size_bytes for entry in self._files.entries()]
        counters = {"hits": self._hits, "misses": self._misses, "corrupt": self._corrupt}
        return CacheStats(path=str(self._files.root), num_entries=len(sizes), size_bytes=sum(sizes), **counters)

    def prune(self, size_bytes: int | None = None) -> int:
        """Evict least recently used entries down to `size_bytes` (the limit without it); returns how many left."""
        limit = self._files.limit_bytes if size_bytes is None else size_bytes
        return self._files.evict(limit, limit)

    def verify(self) -> tuple[int, int]:
        """Check every entry and remove the corrupt ones; returns how many were checked and how many were corrupt."""
        before = self._corrupt
        keys = [entry.key for entry in self._files.entries()]
        for key in keys:
            self._get(key, is_use=False)
        return len(keys), self._corrupt - before

    def clear(self) -> int:
        """Remove all entries; returns how many."""
        return self.prune(0)

    def _get(self, key: bytes, is_use: bool = True) -> torch.Tensor | None:
        try:
            return _decode(key, self._files.read(key, is_use))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, RuntimeError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in _PASSING:
                self._warn_once("the latent cache %s cannot be read (%s): encoding instead", self._files.root, error)
                return None
            self._corrupt += 1
            message = (
                "the latent cache %s has damaged entries (the first: %s): encoding them again; "
                "check the disk, and run `python -m utils.compress.latent_cache verify`"
            )
            self._warn_once(message, self._files.root, error)
            with contextlib.suppress(OSError):
                self._files.remove(key)
            return None

    def _not_stored(self, message: str, *values: Any) -> None:
        if self._strict:
            raise ConfigError(f"{message % values}; make room, or name another --cache-dir, and run it again")
        self._warn_once(message, *values)

    def _warn_once(self, message: str, *values: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)


def _checksum(key: bytes, header: bytes, data: memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(header, zlib.crc32(key)))


def _encode(key: bytes, latents_ND: torch.Tensor) -> tuple[bytes, memoryview]:
    import torch

    assert latents_ND.ndim == 2, list(latents_ND.shape)
    assert latents_ND.numel() > 0, list(latents_ND.shape)
    data = latents_ND.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
    fields = (_DTYPES.index(str(latents_ND.dtype).removeprefix("torch.")), *latents_ND.shape)
    return _HEADER.pack(*fields, _checksum(key, _HEADER.pack(*fields, 0), data)), data


def _decode(key: bytes, entry: bytearray) -> torch.Tensor:
    """The latents; a ValueError where the entry is not what was written under this key."""
    import torch

    if len(entry) <= _HEADER.size:
        raise ValueError(f"an entry of {len(entry)} bytes")
    *fields, checksum = _HEADER.unpack_from(entry)
    if checksum != _checksum(key, _HEADER.pack(*fields, 0), memoryview(entry)[_HEADER.size :]):
        raise ValueError("an entry fails its checksum")
    dtype, num_latents, width = fields
    latents = torch.frombuffer(entry, dtype=getattr(torch, _DTYPES[dtype]), offset=_HEADER.size)
    return latents.view(num_latents, width)


def parse_size(text: str) -> int:
    """Bytes of `500M`, `4G`, `1.5GiB` (powers of 1024) or a plain number, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected for example 500M or 4G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "Look after the latent cache: what it holds, its size, its health.",
        examples="""\
  python -m utils.compress.latent_cache show
  python -m utils.compress.latent_cache prune --max-size 1G
  python -m utils.compress.latent_cache verify --json
  python -m utils.compress.latent_cache clear""",
        prog="python -m utils.compress.latent_cache",
    )
    parser.add_argument(
        "command",
        choices=("show", "prune", "verify", "clear"),
        help="show: entries and sizes; prune: evict the least recently used entries; verify: check every entry, remove "
        "corrupt ones (exit code 3 if there were any); clear: remove all entries",
    )
    default_dir = f"${CACHE_DIR_VARIABLE}, else {_DEFAULT_DIR}"
    parser.add_argument("--cache-dir", type=Path, help=f"cache folder (default: {default_dir})")
    parser.add_argument("--max-size", type=parse_size, help="what prune keeps, such as 500M (default: 4G)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    if args.max_size is not None and args.command != "prune":
        raise ConfigError(f"--max-size belongs to prune, not to {args.command}")
    cache = LatentCache.open(args.cache_dir)
    result: dict[str, Any] = {}
    if args.command == "prune":
        result["evicted"] = cache.prune(args.max_size)
    elif args.command == "verify":
        result["checked"], result["corrupt"] = cache.verify()
    elif args.command == "clear":
        result["removed"] = cache.clear()
    state = asdict(cache.stats())
    result |= {name: state[name] for name in ("path", "num_entries", "size_bytes")}
    if args.json:
        print_json(result)
    else:
        sys.stdout.write("".join(f"{name.replace('_', ' '):<12} {value}\n" for name, value in result.items()))
    return EXIT_FAILED_ROWS if result.get("corrupt") else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
