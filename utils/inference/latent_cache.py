"""Latents on disk, found by their content: the same window of the same text is encoded once.

    cache = LatentCache.open()
    key = window_key(namespace, left=[], core=token_ids, right=[])
    (latents,) = cache.get_many([key])           # None, or a bit-identical copy of what was put
    cache.put_many([key], [latents])

A key names everything the latents depend on: the namespace (a fingerprint of encoder and adapter weights, their
configuration and the chunk size, given by the compressor) and the window's token ids with its overlap context. A value
carries a checksum; an entry that fails it is a miss, is removed, counted and reported. A cache that cannot be written
(disk full, …) warns once and caches nothing; it never fails a compression and never returns a wrong row.

As a command: `python -m utils.inference.latent_cache show`.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import sqlite3
import struct
import sys
import time
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import EXIT_FAILED_ROWS, EXIT_OK, make_parser, print_json, run_command
from utils.errors import CodeLlavaError, ConfigError
from utils.inference.latent_store import MAX_LIMIT_BYTES, LatentStore

if TYPE_CHECKING:
    import torch

    from utils.model.prompt import TokenIds

logger = logging.getLogger(__name__)

CACHE_DIR_VARIABLE = "CODE_LLAVA_CACHE_DIR"
DEFAULT_LIMIT_BYTES = 4 << 30
# Uses are noted in memory and written together: a hit must not cost a disk write.
TOUCH_INTERVAL_S = 60.0

_HEADER = struct.Struct("<B3xIII")  # dtype, latents, width, checksum; 16 bytes keep the rows aligned
_DTYPES = ("float32", "bfloat16", "float16")  # the position is the code on disk
_KEY_BYTES = 32
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """State of the cache on disk, and what this `LatentCache` met.

    Attributes:
        path: The cache folder.
        num_entries: Windows on disk.
        size_bytes: Bytes of the database's pages in use.
        file_bytes: Bytes of the database file; room of evicted entries is used again.
        limit_bytes: Above it the least recently used entries leave.
        hits: Keys answered since this object was opened.
        misses: Keys not answered, corrupt ones included.
        corrupt: Entries that failed their checksum.
    """

    path: str
    num_entries: int
    size_bytes: int
    file_bytes: int
    limit_bytes: int
    hits: int
    misses: int
    corrupt: int


def default_cache_dir() -> Path:
    """`$CODE_LLAVA_CACHE_DIR`, else `~/.cache/code-llava/latents`."""
    return Path(os.environ.get(CACHE_DIR_VARIABLE) or "~/.cache/code-llava/latents").expanduser()


def window_key(namespace: bytes, left: TokenIds, core: TokenIds, right: TokenIds) -> bytes:
    """Key of one encoder window, 32 bytes.

    Args:
        namespace: Fingerprint of all that turns ids into latents.
        left: Encoder ids of the overlap before the window.
        core: The window's own ids.
        right: Ids of the overlap after it.
    """
    digest = hashlib.blake2b(
        struct.pack("<4I", len(namespace), len(left), len(core), len(right)), digest_size=_KEY_BYTES
    )
    digest.update(namespace)
    for ids in (left, core, right):
        digest.update(array("I", ids))
    return digest.digest()


class LatentCache:
    """A content-addressed store of latents; safe for many threads and processes."""

    def __init__(self, store: LatentStore, limit_bytes: int, strict: bool = False) -> None:
        self._store = store
        self._limit_bytes = limit_bytes
        self._strict = strict
        self._closed = False
        self._hits = self._misses = self._corrupt = 0
        self._touched: set[bytes] = set()
        self._last_touch = time.monotonic()
        self._warned: set[str] = set()

    @classmethod
    def open(
        cls, path: str | Path | None = None, size_limit_bytes: int = DEFAULT_LIMIT_BYTES, *, strict: bool = False
    ) -> LatentCache:
        """Open or make the cache.

        Args:
            path: Cache folder on a local disk; `default_cache_dir()` without it.
            size_limit_bytes: Entries beyond it evict those used longest ago.
            strict: Latents that cannot be stored are a `ConfigError`, for a job whose result the cache is.

        Raises:
            ConfigError: The folder cannot be written, or the limit is out of range.
        """
        if not 0 < size_limit_bytes <= MAX_LIMIT_BYTES:
            raise ConfigError(f"cache size limit is {size_limit_bytes} bytes, expected 1 to {MAX_LIMIT_BYTES}")
        folder = Path(path) if path is not None else default_cache_dir()
        try:
            return cls(LatentStore.shared(folder), size_limit_bytes, strict)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the latent cache {folder} cannot be used: {error}: name another folder with --cache-dir or "
                f"${CACHE_DIR_VARIABLE}, or go without it: --no-cache"
            ) from None

    def __enter__(self) -> LatentCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is pending and let go of the database; a second call does nothing."""
        if not self._closed:
            self._flush_touches()
            self._closed = True
            self._store.release()

    def get_many(self, keys: Sequence[bytes]) -> list[torch.Tensor | None]:
        """Latents [n, D] on the CPU in the dtype they were put with, one per key; None for a miss."""
        try:
            entries = self._store.read(keys)
        except (sqlite3.Error, OSError) as error:
            self._warn_once("the latent cache %s cannot be read (%s): encoding instead", self._store.root, error)
            entries = [None] * len(keys)
        found = [None if entry is None else _decode(key, entry) for key, entry in zip(keys, entries, strict=True)]
        hits = [key for key, latents in zip(keys, found, strict=True) if latents is not None]
        bad = [key for key, entry, latents in zip(keys, entries, found, strict=True) if entry and latents is None]
        self._hits += len(hits)
        self._misses += len(keys) - len(hits)
        if bad:
            self._drop_corrupt(bad)
        self._touched.update(hits)
        if time.monotonic() - self._last_touch > TOUCH_INTERVAL_S:
            self._flush_touches()
        return found

    def put_many(self, keys: Sequence[bytes], latents: Sequence[torch.Tensor]) -> None:
        """Add latents, one tensor [n, D] of a float dtype a key; a key that is there keeps its rows."""
        items = [(key, _encode(key, rows)) for key, rows in zip(keys, latents, strict=True)]
        self._flush_touches()
        try:
            left_out = self._store.write(items, self._limit_bytes)
        except (sqlite3.Error, OSError) as error:
            self._not_stored("the latent cache %s cannot be written (%s): not caching", self._store.root, error)
            return
        if left_out:
            self._not_stored(
                "%d of %d windows were not cached: together they pass the limit of %d bytes",
                left_out, len(items), self._limit_bytes,
            )  # fmt: skip

    def stats(self) -> CacheStats:
        """State and counters."""
        num_entries, size_bytes, file_bytes = self._store.usage()
        return CacheStats(
            path=str(self._store.root), num_entries=num_entries, size_bytes=size_bytes, file_bytes=file_bytes,
            limit_bytes=self._limit_bytes, hits=self._hits, misses=self._misses, corrupt=self._corrupt,
        )  # fmt: skip

    def prune(self, size_bytes: int | None = None) -> int:
        """Evict least recently used entries down to `size_bytes` (the limit without it) and shrink the file.

        Returns:
            How many entries left.
        """
        self._flush_touches()
        return self._store.shrink(self._limit_bytes if size_bytes is None else size_bytes)

    def verify(self) -> tuple[int, int]:
        """Check every entry and remove the corrupt ones; returns how many were checked and how many were corrupt."""
        self._store.forget_pages()
        keys = self._store.keys()
        bad = []
        for key in keys:
            (entry,) = self._store.read([key])
            if entry is not None and _decode(key, entry) is None:
                bad.append(key)
        self._store.delete(bad)
        self._corrupt += len(bad)
        return len(keys), len(bad)

    def clear(self) -> None:
        """Remove all entries and give their room back to the file system."""
        self._touched.clear()
        self._store.clear()

    def _drop_corrupt(self, keys: list[bytes]) -> None:
        self._corrupt += len(keys)
        self._warn_once(
            "the latent cache %s has entries that fail their checksum (%d now): encoding them again; "
            "check the disk, and run `python -m utils.inference.latent_cache verify`",
            self._store.root, len(keys),
        )  # fmt: skip
        try:
            self._store.delete(keys)
        except (sqlite3.Error, OSError) as error:
            self._warn_once("the latent cache %s cannot be repaired (%s)", self._store.root, error)

    def _flush_touches(self) -> None:
        touched, self._touched = self._touched, set()
        self._last_touch = time.monotonic()
        if not touched:
            return
        try:
            self._store.touch(touched)
        except (sqlite3.Error, OSError) as error:
            self._warn_once("the latent cache %s cannot note uses (%s)", self._store.root, error)

    def _not_stored(self, message: str, *values: Any) -> None:
        if self._strict:
            raise ConfigError(f"{message % values}; make room, or name another --cache-dir, and run it again")
        self._warn_once(message, *values)

    def _warn_once(self, message: str, *values: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)


def _checksum(key: bytes, header: bytes, data: bytes | bytearray | memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(header, zlib.crc32(key)))


def _encode(key: bytes, latents_ND: torch.Tensor) -> bytes:
    import torch

    dtype = str(latents_ND.dtype).removeprefix("torch.")
    assert latents_ND.ndim == 2, list(latents_ND.shape)
    assert latents_ND.numel() > 0, list(latents_ND.shape)
    data = latents_ND.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    fields = (_DTYPES.index(dtype), *latents_ND.shape)
    return _HEADER.pack(*fields, _checksum(key, _HEADER.pack(*fields, 0), data)) + data


def _decode(key: bytes, entry: bytearray) -> torch.Tensor | None:
    """The latents, or None when the entry is not what was written under this key."""
    import torch

    if len(entry) < _HEADER.size:
        return None
    dtype, num_latents, width, checksum = _HEADER.unpack_from(entry)
    data = memoryview(entry)[_HEADER.size :]
    if checksum != _checksum(key, _HEADER.pack(dtype, num_latents, width, 0), data) or dtype >= len(_DTYPES):
        return None
    latents = torch.frombuffer(entry, dtype=torch.uint8, offset=_HEADER.size).view(getattr(torch, _DTYPES[dtype]))
    return latents.view(num_latents, width)


def parse_size(text: str) -> int:
    """Bytes of `500M`, `4G`, `1.5GiB` (powers of 1024) or a plain number; argparse shows the ValueError as usage."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected for example 500M or 4G")
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "Look after the latent cache: what it holds, its size, its health.",
        examples="""\
  python -m utils.inference.latent_cache show
  python -m utils.inference.latent_cache prune --max-size 1G
  python -m utils.inference.latent_cache verify --json
  python -m utils.inference.latent_cache clear""",
        prog="python -m utils.inference.latent_cache",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{show,prune,verify,clear}")
    for name, summary in (
        ("show", "show entries and sizes"),
        ("prune", "evict the least recently used entries and shrink the file"),
        ("verify", "check every entry, remove corrupt ones (exit code 3 if there were any)"),
        ("clear", "remove all entries"),
    ):
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        command.add_argument(
            "--cache-dir", type=Path, help=f"cache folder (default: ${CACHE_DIR_VARIABLE}, else {default_cache_dir()})"
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "prune":
            command.add_argument(
                "--max-size",
                type=parse_size,
                default=DEFAULT_LIMIT_BYTES,
                help="size to keep, such as 500M (default: 4G)",
            )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    try:
        return _look_after(args)
    except sqlite3.Error as error:
        raise CodeLlavaError(f"the latent cache could not be read or written: {error}: try again") from None


def _look_after(args: argparse.Namespace) -> int:
    with LatentCache.open(args.cache_dir) as cache:
        result: dict[str, Any] = {}
        if args.command == "prune":
            result["evicted"] = cache.prune(args.max_size)
        elif args.command == "verify":
            result["checked"], result["corrupt"] = cache.verify()
        elif args.command == "clear":
            result["removed"] = cache.stats().num_entries
            cache.clear()
        state = asdict(cache.stats())
        result |= {name: state[name] for name in ("path", "num_entries", "size_bytes", "file_bytes")}
    if args.json:
        print_json(result)
    else:
        sys.stdout.write("".join(f"{name.replace('_', ' '):<12} {value}\n" for name, value in result.items()))
    return EXIT_FAILED_ROWS if result.get("corrupt") else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
