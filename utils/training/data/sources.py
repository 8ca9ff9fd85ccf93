"""Python sources on this machine, as training text and – apart from it – as evaluation text.

Training reads installed packages under permissive licences and the standard library (PSF licence). Standard-library
modules whose names start with o, p, t or z are held out for evaluation and never trained on; neither are the packages
from which RULER's code haystacks are made. Two files with one text count once.
"""

from __future__ import annotations

import importlib.metadata
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.corpus.reading import UnusableTextError, open_regular, read_whole
from utils.errors import DatasetError
from utils.files import sha256_bytes
from utils.packages import is_for_evaluation, permissive_licence

INSTALLED = "installed"
HELD_OUT_INITIALS = tuple("optz")
_OWN_PACKAGE = "code-llava"
_SKIPPED_FOLDERS = frozenset(("test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "__pycache__"))
_MIN_LINES, _MAX_BYTES, _MAX_LINE = 20, 200_000, 160


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One Python file.

    Attributes:
        path: Its path inside its package, with forward slashes.
        text: Its text, ending with a line end.
        package: Where it comes from.
        licence: Under what licence, as the package states it.
    """

    path: str
    text: str
    package: str
    licence: str

    @property
    def lines(self) -> list[str]:
        """Its lines, with their ends."""
        return self.text.splitlines(keepends=True)

    @property
    def origin(self) -> str:
        """One line for reports."""
        return f"{self.package}: {self.path} ({self.licence})"


def training_sources(source: str = INSTALLED) -> Iterator[SourceFile]:
    """Files to train on, in a fixed order, without duplicates and without anything that is held out.

    Args:
        source: "installed", or a folder of Python files.

    Raises:
        DatasetError: The folder is not there.
    """
    held_out = {sha256_bytes(file.text.encode()) for file in held_out_sources()}
    found = _installed() if source == INSTALLED else _folder(source)
    return _without(found, held_out)


def held_out_sources() -> Iterator[SourceFile]:
    """Standard-library files that are kept for evaluation."""
    return _without((f for f in standard_library() if f.path.startswith(HELD_OUT_INITIALS)), set())


def folder_sources(folder: str) -> Iterator[SourceFile]:
    """All files of a folder, also such as are held out: for evaluation.

    Raises:
        DatasetError: The folder is not there.
    """
    return _without(_folder(folder), set())


def _without(files: Iterable[SourceFile], seen: set[str]) -> Iterator[SourceFile]:
    for file in files:
        digest = sha256_bytes(file.text.encode())
        if digest not in seen:
            seen.add(digest)
            yield file


def _folder(source: str) -> Iterator[SourceFile]:
    root = Path(source)
    if not root.is_dir():
        raise DatasetError(f"{source} is no folder: give one with Python files, or `installed`")
    licence = "unknown (a folder of the user's)"
    return _read(root, sorted(root.rglob("*.py")), root.name, licence, within=Path(os.path.realpath(root)))


def _installed() -> Iterator[SourceFile]:
    yield from (file for file in standard_library() if not file.path.startswith(HELD_OUT_INITIALS))
    packages = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions()}
    for name, package in sorted(packages.items()):
        if is_for_evaluation(name) or name == _OWN_PACKAGE:
            continue
        licence = permissive_licence(package)
        if licence is None:
            continue
        root = Path(str(package.locate_file("")))
        files = [root / file for file in package.files or [] if file.suffix == ".py" and ".." not in file.parts]
        yield from _read(root, sorted(files), name, licence)


def standard_library() -> Iterator[SourceFile]:
    """Python's own modules, held out or not."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _read(root, sorted(root.rglob("*.py")), "python", "PSF-2.0")


def _read(
    root: Path, paths: Iterable[Path], package: str, licence: str, within: Path | None = None
) -> Iterator[SourceFile]:
    for path in paths:
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and (text := _usable_text(path, within)):
            yield SourceFile(path=relative.as_posix(), text=text, package=package, licence=licence)


def _usable_text(path: Path, within: Path | None) -> str | None:
    """The text of a file that reads well: not tiny, not huge, no endless lines, no memory markers.

    Links are followed, in a folder that may be anybody's only to files `within` it.
    """
    try:
        if path.is_symlink():
            path = Path(os.path.realpath(path, strict=True))
            if within is not None and not path.is_relative_to(within):
                return None
        with open_regular(path) as stream:
            raw = read_whole(stream, _MAX_BYTES)
        text = raw.decode("utf-8").replace("\r\n", "\n").expandtabs(4).rstrip() + "\n"
    except (OSError, UnusableTextError, UnicodeDecodeError):
        return None
    lines = text.split("\n")
    fits = len(lines) >= _MIN_LINES and max(map(len, lines)) <= _MAX_LINE
    return text if fits and "<|" not in text and "\f" not in text and "\r" not in text else None
