"""Files of which nothing is known: opened without waiting, read within a bound. Knows no torch.

with open_regular(path) as stream:            # no pipe, socket or device, which could block or never end
    data = read_whole(stream, limit_bytes)    # however large the file is, or becomes meanwhile
    for offset, line in read_lines(stream, limit_bytes): …
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.errors import DatasetError

_BLOCK_BYTES = 1 << 20
# A pipe that came into a file's place after it was looked at does not block; neither is a link in its place followed.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))


class UnusableTextError(DatasetError):
    """One document cannot be encoded; the message is the reason without the place."""


class NoTextError(UnusableTextError):
    """A file is no text."""


@contextlib.contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that is no link.

    Raises:
        UnusableTextError: It cannot be opened or read, or is no regular file.
    """
    try:
        # Before it is opened, too: that alone makes some devices act.
        _refuse_irregular(os.lstat(path))
        with os.fdopen(os.open(path, _FLAGS), "rb") as stream:
            _refuse_irregular(os.fstat(stream.fileno()))
            yield stream
    except OSError as error:
        raise UnusableTextError(f"cannot be read ({error.strerror})") from None
    except MemoryError:
        raise UnusableTextError("does not fit into memory") from None


def read_whole(stream: BinaryIO, limit_bytes: int) -> bytes:
    """All bytes of a file.

    Raises:
        UnusableTextError: There are more than the limit; at most so many are read, and none if the size says so.
    """
    size = os.fstat(stream.fileno()).st_size
    if size > limit_bytes:
        raise UnusableTextError(too_long(f"has {size} bytes", limit_bytes))
    blocks, left = [], limit_bytes + 1
    while left > 0 and (block := stream.read(min(size + 1, _BLOCK_BYTES, left))):
        blocks.append(block)
        left -= len(block)
    if left <= 0:
        raise UnusableTextError(too_long("grew while it was read", limit_bytes))
    return b"".join(blocks)


def read_lines(stream: BinaryIO, limit_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The first byte's offset and the bytes, line end included, of each line; None in place of more than the limit."""
    offset = 0
    while data := stream.readline(limit_bytes + 1):
        if len(data) > limit_bytes and not data.endswith(b"\n"):
            yield offset, None
            _pass_line(stream)
        else:
            yield offset, data
        offset = stream.tell()


def too_long(what: str, limit_bytes: int) -> str:
    """Why a file or line with more bytes than the limit cannot be encoded."""
    return f"{what}; a text may have {limit_bytes} bytes: raise --max-text-size"


def _pass_line(stream: BinaryIO) -> None:
    """Go to the next line."""
    while block := stream.read(_BLOCK_BYTES):
        if (end := block.find(b"\n")) >= 0:
            stream.seek(end + 1 - len(block), os.SEEK_CUR)
            return
        _pass_hole(stream)


def _pass_hole(stream: BinaryIO) -> None:
    """Go on to what a sparse file really has: its holes may be larger than any disk."""
    if hasattr(os, "SEEK_DATA"):
        try:
            stream.seek(stream.tell(), os.SEEK_DATA)
        except OSError as error:
            # There is nothing but a hole; other errors are of file systems that know no holes.
            stream.seek(0, os.SEEK_END if error.errno == errno.ENXIO else os.SEEK_CUR)


def _refuse_irregular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnusableTextError("no regular file")
