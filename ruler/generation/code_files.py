"""Source files for the code tasks: from a folder, or from installed packages under permissive licences.

Python and C++ files come from packages that this project needs anyway, so every user has them; JavaScript comes from a
package of the extra `code-tasks`. Another version of a package gives other samples, which the manifest shows.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.errors import DatasetError
from utils.files import sha256_bytes
from utils.packages import EVALUATION_PACKAGES, permissive_licence

_MIN_LINES = 20
EXTRA_COMMAND = "uv sync --extra code-tasks"
_TOP_LEVEL = re.compile(r"(?<=\n)(?=[^\s])")


@dataclass(frozen=True, kw_only=True)
class Language:
    """A programming language and where its files come from.

    Attributes:
        title: Its name in messages.
        suffixes: Endings of its files' names.
        packages: Distribution → beginnings of the paths that are taken of it; an empty one takes all.
        comment: What begins a comment that ends with its line.
        max_bytes: Larger files are left out.
        max_line: Files with longer lines are left out, in characters.
        min_files: With fewer files there is no task.
        own_licence: The licence is named in the files, not in the package's metadata, and looked for there.
        extra: The packages belong to the extra `code-tasks`.
    """

    title: str
    suffixes: tuple[str, ...]
    packages: Mapping[str, tuple[str, ...]]
    comment: str
    max_bytes: int = 60_000
    max_line: int = 160
    min_files: int = 4
    own_licence: bool = False
    extra: bool = False


# PyTorch's own headers; beside them lie those of other projects, under other licences, and generated ones (ATen/ops).
_TORCH_FOLDERS = ("ATen/core", "ATen/cpu", "ATen/cuda", "ATen/native", "ATen/detail", "c10", "torch/csrc")
LANGUAGES: dict[str, Language] = {
    "python": Language(
        title="Python", suffixes=(".py",), packages=dict.fromkeys(EVALUATION_PACKAGES, ("",)), comment="#"
    ),
    "cpp": Language(
        title="C++",
        suffixes=(".h", ".hpp", ".cpp", ".cc"),
        packages={"torch": tuple(f"torch/include/{folder}/" for folder in _TORCH_FOLDERS)},
        comment="//",
    ),
    "javascript": Language(
        title="JavaScript",
        suffixes=(".js",),
        packages={"xstatic-lodash": ("xstatic/pkg/lodash/data/lodash.js",)},
        comment="//",
        max_bytes=1_000_000,
        max_line=200,
        min_files=1,  # a library is one file of hundreds of functions
        own_licence=True,
        extra=True,
    ),
}  # fmt: skip


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
        licences: Package → the permissive licence that it names.
    """

    files: tuple[CodeFile, ...]
    origin: dict[str, Any]
    licences: dict[str, str] = field(default_factory=dict)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Origin, number and fingerprint of the files."""
        listing = "\n".join(f"{file.path} {sha256_bytes(file.text.encode())}" for file in self.files)
        return {**self.origin, "num_files": len(self.files), "sha256": sha256_bytes(listing.encode())}


def read_code_folder(folder: Path, language: str = "python") -> CodeFiles:
    """Files of one language below a folder.

    Args:
        folder: The folder.
        language: A name of `LANGUAGES`.

    Raises:
        DatasetError: There are fewer than can be used.
    """
    suffixes = LANGUAGES[language].suffixes
    paths = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)
    found = ((path.relative_to(folder).as_posix(), path) for path in paths)
    return _pile(found, LANGUAGES[language], {"source": "code folder"}, str(folder))


def read_installed_code(language: str = "python") -> CodeFiles:
    """Files of one language of the installed packages that `LANGUAGES` names for it.

    Raises:
        DatasetError: The packages are not there.
    """
    wanted, found, versions, licences = LANGUAGES[language], [], {}, {}
    for name, folders in wanted.packages.items():
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        files = [
            (file.as_posix(), Path(str(package.locate_file(file))))
            for file in package.files or []
            if file.suffix in wanted.suffixes
            and file.as_posix().startswith(folders)
            and ".." not in file.parts
            and "tests" not in file.parts
        ]
        licence = _licence_in(files) if wanted.own_licence else permissive_licence(package)
        if licence is None:
            continue
        versions[name], licences[name] = package.version, licence
        found += files
    origin = {"source": "installed packages", "packages": versions}
    return _pile(sorted(found), wanted, origin, "the installed packages", licences)


def _licence_in(files: Iterable[tuple[str, Path]]) -> str | None:
    """The permissive licence that every one of some files names in its first lines; None where one names none."""
    names = set()
    for _, path in files:
        with path.open(encoding="utf-8", errors="replace") as stream:
            found = re.search(r"\b(MIT|BSD|Apache|ISC)\b[^\n<]*?licen[sc]e", stream.read(2000))
        if found is None:
            return None
        names.add(f"{found.group(1)} (named in the files)")
    return " AND ".join(sorted(names)) or None


def _pile(
    found: Iterable[tuple[str, Path]],
    language: Language,
    origin: dict[str, Any],
    where: str,
    licences: dict[str, str] | None = None,
) -> CodeFiles:
    files = [CodeFile(name, text) for name, path in found if (text := _usable_text(path, language))]
    if len(files) < language.min_files:
        advice = f"; install what the extra tasks read ({EXTRA_COMMAND})" if language.extra else ""
        raise DatasetError(
            f"{where}: {len(files)} usable {language.title} files, the code tasks need {language.min_files} or more"
            f"{advice}"
        )
    return CodeFiles(tuple(files), origin, licences or {})


def _usable_text(path: Path, language: Language) -> str | None:
    """The text of a file that reads well in a prompt: not tiny, not huge, no endless lines."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8").replace("\r\n", "\n").rstrip() + "\n"
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.split("\n")
    fits = len(raw) <= language.max_bytes and len(lines) >= _MIN_LINES and max(map(len, lines)) <= language.max_line
    return text if fits and "\f" not in text and "\r" not in text else None
