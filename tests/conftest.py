"""What all tests share: one thread, a private latent cache, no network, tiny checkpoints written once a run."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# Before any Hugging Face module is imported: no test may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Each of the many processes that tests start would compile anew all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Where the project is not installed, PYTHONPATH leads to it: also for processes that tests start in other folders.
if os.environ.get("PYTHONPATH"):
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep)))

# A shell lets what it starts in the background ignore Ctrl-C, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is slow, not wrong. More examples: `pytest --hypothesis-profile thorough`.
hypothesis.settings.register_profile("project", deadline=None, max_examples=20)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile("project")

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    # The models are tiny: a second thread would only wait for the first.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # One folder a test: a latent that another test stored could hide a wrong one here.
    monkeypatch.setenv("CODE_LLAVA_CACHE_DIR", str(tmp_path_factory.mktemp("latents")))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints by layout: `code-llava` and `lclm`. Read them; `copied` makes one to damage."""
    from tests.support.tiny import write_checkpoint
    from utils.checkpoint.layout import LAYOUTS
    from utils.model.config import CompressionConfig

    root = tmp_path_factory.mktemp("checkpoints")
    configs = {
        "code-llava": CompressionConfig(chunk_size=4, window=4, pooling="eos"),
        "lclm": CompressionConfig(chunk_size=4, window=32),
    }
    return {x.name: write_checkpoint(root / x.name, configs[x.name], layout=x) for x in LAYOUTS}


@pytest.fixture
def copied(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a tiny checkpoint (`code-llava` or `lclm`), or a golden one, to a folder that the test may damage."""

    def copy(name: str = "code-llava") -> Path:
        return shutil.copytree(checkpoints.get(name, GOLDEN / name), tmp_path / "copies" / name)

    return copy
