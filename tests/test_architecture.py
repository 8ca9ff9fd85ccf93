"""The map in docs/architecture.md, held: who may import whom, and that libraries stay silent."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.files import PROJECT_ROOT

# Floor → its modules, in order. At the top of a file a module imports only what stands before it here; inside a
# function also what stands beside it on its floor. A name that ends in `.` is a folder: its modules may import each
# other. A new module must find its place here and in docs/architecture.md.
FLOORS: dict[int, tuple[str, ...]] = {
    0: (
        "utils.errors",
        "utils.files",
        "utils.pretrained",
        "utils.locks",
        "utils.intervals",
        "utils.cli",
        "utils.model.markers",
        "utils.model.config",
    ),
    1: ("utils.model.prompt", "utils.inference.prompt_embeds"),
    2: (
        "utils.model.transfer",
        "utils.model.packed_attention",
        "utils.model.code_chunker",
        "utils.model.adapter",
        "utils.model.splice",
    ),
    3: ("utils.model.processor", "utils.model.code_llava_model", "utils.model.cost"),
    4: (
        "utils.inference.checkpoint",
        "utils.inference.saving",
        "utils.inference.lora_folder",
        "utils.inference.weights",
        "utils.inference.trained_part",
        "utils.inference.trainer_names",
        "utils.inference.safe_metadata",
        "utils.inference.trainer_state",
        "utils.inference.trainer_merge",
        "utils.inference.default_checkpoint",
        "utils.inference.latent_files",
        "utils.inference.latent_cache",
        "utils.inference.flags",
        "utils.inference.span_encoder",
        "utils.inference.compressor",
        "utils.inference.corpus.reading",
        "utils.inference.corpus.source",
        "utils.inference.corpus.plan",
        "utils.inference.corpus.crew",
        "utils.inference.corpus.shards",
        "utils.inference.corpus.output",
        "utils.inference.corpus.reader",
        "utils.inference.corpus.encoder",
        "utils.inference.corpus.ray",
        "utils.inference.corpus.run",
        "utils.inference.encode_corpus",
        "utils.inference.inference",
        "utils.inference.describe",
        "utils.inference.convert",
        "utils.inference.server_connection",
        "utils.inference.server_answer",
        "utils.inference.vllm_client",
    ),
    5: ("utils.serving.", "utils.training."),
    6: ("utils.benchmark.", "general.", "main"),
}
# Beside the building: what each package may take from it.
EVALUATION = {
    "ruler.": (0,),
    "ruler_minimal.": (0,),
}
BACKENDS = "ruler.backends"

ROOMS = [(room, floor) for floor, rooms in FLOORS.items() for room in rooms]
PACKAGES = ("utils", "general", "ruler", "ruler_minimal")
SKIPPED = ("ruler/RULER/",)  # scripts in the published layout, not modules


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the project."""
    found = {"main": PROJECT_ROOT / "main.py"}
    for package in PACKAGES:
        for path in (PROJECT_ROOT / package).rglob("*.py"):
            relative = path.relative_to(PROJECT_ROOT)
            if not str(relative).startswith(SKIPPED):
                parts = relative.with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room_of(module: str) -> int | None:
    """Index in ROOMS; None outside the building."""
    for index, (room, _) in enumerate(ROOMS):
        if module == room or (room.endswith(".") and (module + ".").startswith(room)):
            return index
    return None


def floor_of(module: str) -> int:
    room = room_of(module)
    assert room is not None, f"{module} has no place in the table"
    return ROOMS[room][1]


def is_empty_package(module: str) -> bool:
    return MODULES[module].name == "__init__.py" and not TREES[module].body


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


def test_every_module_has_a_place() -> None:
    outside = tuple(EVALUATION)
    lost = [m for m in MODULES if not is_empty_package(m) and room_of(m) is None and not (m + ".").startswith(outside)]
    assert lost == []


def test_every_room_exists_or_is_a_folder_to_come() -> None:
    gone = [room for room, _ in ROOMS if not room.endswith(".") and room not in MODULES]
    assert gone == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room_of(m) is not None))
def test_imports_come_from_below(module: str) -> None:
    own = room_of(module)
    assert own is not None
    for name, at_top in imports(module):
        other = room_of(name)
        assert other is not None, f"{module} imports {name}, which is no part of the building"
        if at_top or floor_of(name) != floor_of(module):
            same_folder = other == own and ROOMS[own][0].endswith(".")
            assert other < own or same_folder, f"{module} imports {name}, which stands above it"
        if floor_of(module) == 5:
            assert other == own or floor_of(name) < 5, f"{module} imports its neighbour {name}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if (m + ".").startswith(tuple(EVALUATION))))
def test_evaluation_uses_the_model_through_backends_only(module: str) -> None:
    package = module.split(".")[0]
    for name, _ in imports(module):
        inside = name.split(".")[0]
        if inside in ("ruler", "ruler_minimal"):
            assert inside == package or package == "ruler_minimal", f"{module} imports {name}"
        elif not module.startswith(BACKENDS):
            assert floor_of(name) in EVALUATION[package + "."], f"{module} imports {name}: go through {BACKENDS}"


def calls(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield ast.unparse(node.exc).split("(")[0]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv":
            yield "sys.argv"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("utils.") and m != "utils.cli"))
def test_libraries_are_silent(module: str) -> None:
    """Only commands, which have a `main`, print, read arguments or exit."""
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in TREES[module].body):
        return
    loud = {"print", "input", "exit", "sys.exit", "SystemExit", "sys.argv", "os._exit"}
    assert [call for call in calls(TREES[module]) if call in loud or call.endswith(".parse_args")] == []


def test_the_document_names_every_room() -> None:
    text = (PROJECT_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = []
    for room, floor in ROOMS:
        path = room.replace(".", "/") if room.endswith(".") else room.replace(".", "/") + ".py"
        if f"| {floor} | `{path}` |" not in text:
            missing.append(f"| {floor} | `{path}` |")
    assert missing == []
