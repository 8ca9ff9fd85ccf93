"""Run a benchmark in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from utils.benchmark import __main__ as command


@pytest.fixture
def result_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Call the command with these words and return the JSON of its last line."""

    def run(*argv: object) -> dict[str, Any]:
        assert command.main([str(word) for word in argv]) == 0
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    return run
