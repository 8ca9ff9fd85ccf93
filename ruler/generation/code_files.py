"""Source files for the code tasks: from a folder, or from installed packages under permissive licences.

The installed ones are packages that this project needs anyway, so every user has them; another version of a package
gives other samples, which the manifest shows.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.errors import DatasetError
from utils.files import sha256_bytes

PACKAGES = ("accelerate", "fastapi", "httpx", "huggingface_hub", "jinja2", "networkx", "openai", "peft", "uvicorn")
_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC)\b", re.IGNORECASE)
_MIN_LINES, _MAX_BYTES, _MAX_LINE = 20, 60_000, 160
_TOP_LEVEL = re.compile(r"(?<=\n)(?=[^\s])")


@dataclass(frozen=True)
class CodeFile:
    """One source file.

    Attributes:
        path: Its path within its package or folder, with forward slashes.
        text: Its text, ending with a line end.
    """

    path: str
    text: str

    @cached_property
    def blocks(self) -> list[str]:
        """The text cut before every line that is not indented."""
        return _TOP_LEVEL.split(self.text)

    @cached_property
    def statements(self) -> list[int]:
        """Numbers of the blocks with which a top-level statement starts: where a function may be put before."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in somebody's strings
            tree = ast.parse(self.text)
        lines = set()
        for node in tree.body:
            decorators = getattr(node, "decorator_list", [])
            # `from __future__` must stay in front.
            if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
                lines.add(min([node.lineno, *(item.lineno for item in decorators)]))
        numbers, line = [], 1
        for number, block in enumerate(self.blocks):
            if line in lines and number:
                numbers.append(number)
            line += block.count("\n")
        return numbers


@dataclass(frozen=True)
class CodeFiles:
    """A pile of source files.

    Attributes:
        files: The files, sorted by path.
        origin: Where they come from, for the manifest.
    """

    files: tuple[CodeFile, ...]
    origin: dict[str, Any]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Origin, number and fingerprint of the files."""
        listing = "\n".join(f"{file.path} {sha256_bytes(file.text.encode())}" for file in self.files)
        return {**self.origin, "num_files": len(self.files), "sha256": sha256_bytes(listing.encode())}


def read_code_folder(folder: Path) -> CodeFiles:
    """Python files below a folder.

    Raises:
        DatasetError: There are fewer than four that can be used.
    """
    found = ((path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*.py")))
    return _pile(found, {"source": "code folder"}, str(folder))


def read_installed_code() -> CodeFiles:
    """Python files of the installed packages in `PACKAGES`.

    Raises:
        DatasetError: The packages are not there.
    """
    found, versions = [], {}
    for name in PACKAGES:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        licence = [package.metadata.get_all(field) or [] for field in ("License-Expression", "License", "Classifier")]
        if not any(_PERMISSIVE.search(str(value)) for values in licence for value in values):
            continue
        versions[name] = package.version
        found += [
            (file.as_posix(), Path(str(package.locate_file(file))))
            for file in package.files or []
            if file.suffix == ".py" and ".." not in file.parts and "tests" not in file.parts
        ]
    return _pile(sorted(found), {"source": "installed packages", "packages": versions}, "the installed packages")


def _pile(found: Iterable[tuple[str, Path]], origin: dict[str, Any], where: str) -> CodeFiles:
    files = [CodeFile(name, text) for name, path in found if (text := _usable_text(path))]
    if len(files) < 4:
        raise DatasetError(f"{where}: {len(files)} usable Python files, the code tasks need 4 or more")
    return CodeFiles(tuple(files), origin)


def _usable_text(path: Path) -> str | None:
    """The text of a file that reads well in a prompt: not tiny, not huge, no endless lines."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8").replace("\r\n", "\n").rstrip() + "\n"
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.split("\n")
    fits = len(raw) <= _MAX_BYTES and len(lines) >= _MIN_LINES and max(map(len, lines)) <= _MAX_LINE
    return text if fits and "\f" not in text and "\r" not in text else None
