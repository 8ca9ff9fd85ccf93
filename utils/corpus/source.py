"""Where a corpus's documents come from: the files of a folder, or the lines of a JSONL file. Knows no torch.

    source = FolderSource("src", include=("*.py",))          # a document's id is its path in the folder
    source = JsonlSource("corpus.jsonl", text_field="text", id_field="id")
    for found in source.scan():                               # Document or Problem, one at a time
        …
    text = source.read(document)                              # again, later, in any process: a source can be pickled

A text is taken character for character, line ends included. What cannot be encoded is a `Problem` with its reason,
never passed over: a file that is not UTF-8 or too long, a pipe, a link out of the folder, a line that is not JSON, ….
Nothing that a corpus holds ends the scan, makes it wait, or takes more memory than `max_text_bytes` allows.
"""

from __future__ import annotations

import codecs
import fnmatch
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from utils.corpus.reading import NoTextError, UnusableTextError, open_regular, read_lines, read_whole, too_long
from utils.errors import DatasetError, shown_name
from utils.files import decode_text, parse_json, sha256_bytes
from utils.notebooks import memory_text

# Of one file, or of one line: its tokens and latents are in memory together (16 MiB of code take some 3 GB).
MAX_TEXT_BYTES = 16 << 20
# As long as a path may be: ids stand in the headers of shards.
_MAX_ID_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of a corpus, and where it stands.

    Attributes:
        id: Path in the folder (with `/`), or the line's id; unique in the corpus.
        sha256: Hex sha256 of the text as UTF-8.
        text_bytes: Length of the text as UTF-8.
        offset: First byte of its line.
        size: Bytes of its line.
        line: Number of its line, from 1; all three are 0 for a file.
    """

    id: str
    sha256: str
    text_bytes: int
    offset: int = 0
    size: int = 0
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What cannot be encoded: where it is, and why not; ready to be shown.

    Attributes:
        is_text: False for a file of a folder that is no text, such as a picture: nobody expects it to be encoded.
    """

    place: str
    reason: str
    is_text: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class _Source:
    def read(self, document: Document) -> str:
        """The text of a document.

        Raises:
            UnusableTextError: It is gone, or no longer what the scan found.
        """
        id, text = self._load(document)
        if id != document.id or sha256_bytes(text.encode()) != document.sha256:
            raise UnusableTextError("changed since it was scanned")
        return text

    def _load(self, document: Document) -> tuple[str, str]:
        """What is in its place now: an id and a text."""
        raise NotImplementedError


@dataclass(frozen=True)
class FolderSource(_Source):
    """The files below a folder.

    Hidden files and folders (names that begin with a dot) and linked folders are not part of the corpus; linked files
    are, where the file is part of the folder: a corpus from elsewhere must not name files of its reader's.

    Attributes:
        root: The folder.
        include: Shell patterns of names (`*.py`) or paths (`src/*`) to take; all without one.
        exclude: Patterns to leave out of these.
        left_out: Paths of folders in it that are not part of the corpus: this run's own.
        max_text_bytes: Most bytes of a file.
    """

    root: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    max_text_bytes: int = MAX_TEXT_BYTES
    ordered_by: ClassVar = "id"  # the attribute of `Document` whose order is the corpus's

    def scan(self) -> Iterator[Document | Problem]:
        """Read everything once, in any order, holding one document at a time."""
        pending = [""]
        while pending:
            folder = pending.pop()
            try:
                with os.scandir(Path(self.root) / folder) as entries:
                    for entry in entries:
                        path = f"{folder}/{entry.name}".removeprefix("/")
                        if entry.name.startswith("."):
                            continue
                        if _is_folder(entry, linked=False):
                            if path not in self.left_out:
                                pending.append(path)
                        elif self._wanted(path) and not _is_folder(entry, linked=True):
                            yield self._examine(path)
            except OSError as error:
                yield Problem(
                    place=shown_name(folder or self.root), reason=f"the folder cannot be read ({error.strerror})"
                )

    @property
    def place(self) -> str:
        """The folder, absolute."""
        return os.path.realpath(self.root)

    def _wanted(self, path: str) -> bool:
        names = (path, path.rpartition("/")[2])

        def matches(patterns: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)

        return (not self.include or matches(self.include)) and not matches(self.exclude)

    def _examine(self, path: str) -> Document | Problem:
        try:
            path.encode()
            data = self._text(path).encode()
        except UnicodeEncodeError:
            return Problem(place=shown_name(path), reason="its name is not UTF-8")
        except UnusableTextError as error:
            return Problem(place=shown_name(path), reason=str(error), is_text=not isinstance(error, NoTextError))
        return Document(id=path, sha256=sha256_bytes(data), text_bytes=len(data))

    def _load(self, document: Document) -> tuple[str, str]:
        return document.id, self._text(document.id)

    def _text(self, path: str) -> str:
        with open_regular(self._target(path)) as stream:
            data = read_whole(stream, self.max_text_bytes)
        try:
            text = decode_text(data)
        except UnicodeDecodeError as error:
            if b"\0" in data:
                raise NoTextError("binary (it holds a zero byte)") from None
            raise NoTextError(f"not {error.encoding.upper()} text (byte {error.start})") from None
        if "\0" in text:
            raise NoTextError("binary (it holds a zero byte)")
        try:
            return memory_text(path, text)
        except DatasetError as error:
            raise UnusableTextError(str(error)) from None

    def _target(self, path: str) -> Path:
        """The file behind a path, which may be a link."""
        file = Path(self.root) / path
        try:
            if not file.is_symlink():
                return file
            target = Path(os.path.realpath(file, strict=True))
        except OSError as error:
            raise UnusableTextError(f"cannot be read ({error.strerror})") from None
        root = Path(self.place)
        if not target.is_relative_to(root):
            raise UnusableTextError(f"a link out of the corpus, to {shown_name(str(target))}")
        inside = target.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or any(inside.is_relative_to(folder) for folder in self.left_out):
            raise UnusableTextError(f"a link to {shown_name(str(inside))}, which is not part of the corpus")
        return target


@dataclass(frozen=True)
class JsonlSource(_Source):
    """The lines of a file of JSON objects; blank lines are passed over.

    Attributes:
        path: The file.
        text_field: Key of the text.
        id_field: Key of the id, a text or a whole number; None: the line's number is its id.
        max_text_bytes: Most bytes of a line.
    """

    path: str
    text_field: str = "text"
    id_field: str | None = "id"
    max_text_bytes: int = MAX_TEXT_BYTES
    ordered_by: ClassVar = "line"

    def scan(self) -> Iterator[Document | Problem]:
        """Read everything once, holding one line at a time.

        Raises:
            DatasetError: The file cannot be read.
        """
        try:
            with open_regular(self.place) as stream:
                for number, (offset, line) in enumerate(read_lines(stream, self.max_text_bytes), start=1):
                    if line is None:
                        yield Problem(place=f"line {number}", reason=too_long("is longer", self.max_text_bytes))
                    elif line.strip():
                        yield self._examine(line, number, offset)
        except UnusableTextError as error:
            raise DatasetError(f"{self.path}: {error}") from None

    @property
    def place(self) -> str:
        """The file, absolute."""
        return os.path.realpath(self.path)

    def _examine(self, line: bytes, number: int, offset: int) -> Document | Problem:
        try:
            id, text = self._parse(line, number)
        except UnusableTextError as error:
            return Problem(place=f"line {number}", reason=str(error))
        data = text.encode()
        place = {"offset": offset, "size": len(line), "line": number}
        return Document(id=id, sha256=sha256_bytes(data), text_bytes=len(data), **place)

    def _load(self, document: Document) -> tuple[str, str]:
        with open_regular(self.place) as stream:
            stream.seek(document.offset)
            return self._parse(stream.read(document.size), document.line)

    def _parse(self, line: bytes, number: int) -> tuple[str, str]:
        """Id and text of a line."""
        try:
            row = parse_json(line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8).decode(), "")
        except UnicodeDecodeError as error:
            raise UnusableTextError(f"not UTF-8 (byte {error.start})") from None
        except DatasetError as error:
            raise UnusableTextError(str(error).strip()) from None
        except MemoryError:
            raise UnusableTextError("does not fit into memory") from None
        if not isinstance(row, dict):
            raise UnusableTextError(f"expected a JSON object, got {type(row).__name__}")
        text = row.get(self.text_field)
        if not isinstance(text, str):
            raise UnusableTextError(_wrong_field(row, self.text_field, "a text", "--text-field"))
        id: Any = number if self.id_field is None else row.get(self.id_field)
        if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
            wanted = "a text or whole number"
            raise UnusableTextError(_wrong_field(row, str(self.id_field), wanted, "--id-field or --line-ids"))
        id = str(id)
        try:
            text.encode()
            if len(id.encode()) > _MAX_ID_BYTES or "\0" in id:
                raise UnusableTextError(f"its id is longer than {_MAX_ID_BYTES} bytes, or holds a zero byte")
        except UnicodeEncodeError:
            raise UnusableTextError("its text or id holds half a character (a lone surrogate)") from None
        return id, text


Source: TypeAlias = FolderSource | JsonlSource


def _is_folder(entry: os.DirEntry[str], linked: bool) -> bool:
    """Whether this is a folder, or with `linked` also a link to one."""
    try:
        return entry.is_dir(follow_symlinks=linked)
    except OSError:
        # A link to itself, …: examined as a file, which says what is wrong with it.
        return False


def _wrong_field(row: dict[str, Any], field: str, wanted: str, flag: str) -> str:
    if field not in row:
        shown = [repr(key if len(key) <= 40 else f"{key[:40]}…") for key in itertools.islice(row, 10)]
        more = [f"{len(row) - len(shown)} more"] if len(row) > len(shown) else []
        return f"no key {field!r}, it has {', '.join([*shown, *more]) or 'none'}: name it with {flag}"
    return f"{field!r} must be {wanted}, got {type(row[field]).__name__}"
