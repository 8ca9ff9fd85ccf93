"""A run of lm-eval on a tiny pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run_tasks(checkpoints: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Evaluate tasks by name and return lm-eval's results, samples included."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from utils.harness.__main__ import TASKS
    from utils.harness.lm import CodeLlavaLM

    arguments = {"checkpoint": str(checkpoints["lclm"]), "device": "cpu", "dtype": "float32"}

    def run(
        *tasks: str, metadata: dict[str, Any], folder: Path = TASKS, model: Any = None, chat: bool = False,
        limit: int | None = None, gen_kwargs: dict[str, Any] | None = None, **model_arguments: Any,
    ) -> dict[str, Any]:  # fmt: skip
        lm = model or CodeLlavaLM(**arguments, **model_arguments)
        manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=arguments | metadata)
        results = simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, apply_chat_template=chat, bootstrap_iters=0,
            limit=limit, gen_kwargs=gen_kwargs,
        )  # fmt: skip
        assert results is not None
        return dict(results)

    return run
