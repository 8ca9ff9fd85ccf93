"""Programs with packages of their own, which uv fetches: for tests marked `clients`."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import pytest


def command(package: str, *arguments: object, also: tuple[str, ...] = ()) -> list[str]:
    """A command line that runs in an environment of nothing but a package; skips the test where there is no uv."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = [word for name in (package, *also) for word in ("--with", name)]
    options = ["--quiet", "--no-project", "--isolated", "--python", python, *packages]
    return ["uv", "run", *options, *map(str, arguments)]


def environment(**variables: Any) -> dict[str, str]:
    """What such programs see: nothing of this project, and no wish to ask the network for more."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PYTHONIOENCODING": "utf-8", "LITELLM_LOCAL_MODEL_COST_MAP": "True", **variables}
