"""The line of rooms in docs/architecture.md, held: who may import whom, and that libraries stay silent."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from utils.files import PROJECT_ROOT

# A module imports only from its own room and from rooms that stand before its own; those of one line do not know each
# other. A new room must find its place here and in docs/architecture.md.
LINE: tuple[tuple[str, ...], ...] = (
    (
        "utils/errors.py",
        "utils/files.py",
        "utils/locks.py",
        "utils/cli.py",
        "utils/intervals.py",
        "utils/packages.py",
        "utils/notebooks.py",
        "utils/html_report.py",
        "utils/pretrained.py",
    ),
    ("utils/model/",),
    ("utils/checkpoint/",),
    ("utils/compress/",),
    ("utils/client/", "utils/flags.py"),
    ("utils/inference/", "general/", "utils/corpus/"),
    ("utils/serving/", "utils/training/", "ruler/"),
    ("ruler_minimal/", "utils/harness/"),
    ("utils/benchmark/", "main.py"),
)
PLACE = {room: place for place, rooms in enumerate(LINE) for room in rooms}
# Of the rooms to its left, evaluation takes the ground floor; the rest through the backends alone.
EVALUATION = ("ruler/", "ruler_minimal/")
BACKENDS = "ruler/answering/backends.py"
VALUES = ("utils.model.markers", "utils.client.completion", "utils.compress.arms", "utils.flags")
# Imports of our own modules inside functions, for each thousand lines: a plan is read at the head of its files.
MOST_LATE_IMPORTS = 3.0

PACKAGES = ("utils", "general", "ruler", "ruler_minimal")
SKIPPED = ("ruler/RULER/",)  # scripts in the published layout, not modules


def modules() -> dict[str, Path]:
    """Dotted name → file, from the project's root, of every module."""
    found = {"main": Path("main.py")}
    for package in PACKAGES:
        for path in (PROJECT_ROOT / package).rglob("*.py"):
            relative = path.relative_to(PROJECT_ROOT)
            if not str(relative).startswith(SKIPPED):
                parts = relative.with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = relative
    return found


MODULES = modules()
TREES = {name: ast.parse((PROJECT_ROOT / path).read_text(encoding="utf-8")) for name, path in MODULES.items()}
FILLED = sorted(name for name in MODULES if TREES[name].body)


def room_of(module: str) -> str:
    path = str(MODULES[module])
    room = next((room for room in PLACE if path == room or (room.endswith("/") and path.startswith(room))), None)
    assert room is not None, f"{path} is in no room"
    return room


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Our modules that a module imports, and whether at the top of its file; type-only imports are left out."""
    tree = TREES[module]
    top = set(tree.body)
    type_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in type_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports from the project's root"
            base = node.module or ""
            # `from package import module` names the module.
            names = [f"{base}.{x.name}" if f"{base}.{x.name}" in MODULES else base for x in node.names]
        elif isinstance(node, ast.Import):
            names = [x.name for x in node.names]
        for name in names:
            if name.split(".")[0] in (*PACKAGES, "main"):
                yield name, node in top


@pytest.mark.parametrize("module", FILLED)
def test_imports_come_from_the_left(module: str) -> None:
    own = room_of(module)
    for name, _ in imports(module):
        other = room_of(name)
        one_room = other == own or PLACE[own] == PLACE[other] == 0
        assert one_room or PLACE[other] < PLACE[own], f"{MODULES[module]} imports {name}"


def test_no_circle() -> None:
    graph = {module: {name for name, _ in imports(module)} for module in FILLED}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_few_imports_inside_functions() -> None:
    late = sum(not at_top for module in FILLED for _, at_top in imports(module))
    lines = sum(len((PROJECT_ROOT / path).read_text(encoding="utf-8").splitlines()) for path in MODULES.values())
    assert 1000 * late / lines <= MOST_LATE_IMPORTS, f"{late} in {lines} lines"


@pytest.mark.parametrize("module", [module for module in FILLED if str(MODULES[module]).startswith(EVALUATION)])
def test_evaluation_uses_the_model_through_backends_only(module: str) -> None:
    if str(MODULES[module]) == BACKENDS:
        return
    for name, _ in imports(module):
        allowed = room_of(name).startswith(EVALUATION) or PLACE[room_of(name)] == 0 or name in VALUES
        assert allowed, f"{MODULES[module]} imports {name}: go through {BACKENDS}"


def calls(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield ast.unparse(node.exc).split("(")[0]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv":
            yield "sys.argv"


@pytest.mark.parametrize("module", [name for name in FILLED if name.startswith("utils.") and name != "utils.cli"])
def test_libraries_are_silent(module: str) -> None:
    """Only commands, which have a `main`, print, read arguments or exit."""
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in TREES[module].body):
        return
    loud = {"print", "input", "exit", "sys.exit", "SystemExit", "sys.argv", "os._exit"}
    assert [call for call in calls(TREES[module]) if call in loud or call.endswith(".parse_args")] == []


def test_the_document_has_one_row_a_room() -> None:
    text = (PROJECT_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [room for room in PLACE if text.count(f"| `{room}` |") != 1] == []
