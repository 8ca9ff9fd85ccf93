"""lm-eval's own tasks that need no hub: our model answers them, with what is long in them as memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval

from utils.model.markers import split_spans

# The others of its RULER group need essays, SQuAD and HotpotQA from the hub.
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
# A shorter one lets its variable tracking look for a size for ever.
LENGTH = 1024


@pytest.mark.slow
@pytest.mark.parametrize("task", OFFLINE)
def test_long_contexts_of_lm_evals_tasks_become_memory(
    task: str, run_tasks: Callable[..., dict[str, Any]], default_checkpoint: Path
) -> None:
    metadata = {"tokenizer": str(default_checkpoint / "llm"), "max_seq_lengths": [LENGTH]}
    results = run_tasks(
        task,
        metadata=metadata,
        folder=Path(lm_eval.__file__).parent / "tasks" / "ruler",
        limit=2,
        gen_kwargs={"max_gen_toks": 8},
        chunk_size=32,
        auto_memory=300,
    )
    counts = results["config"]["code_llava"]["counts"]
    assert counts["requests"] == counts["with_memory"] == 2
    assert counts["memory_tokens"] > LENGTH, "the tiny encoder has a token a byte"
    for sample in results["samples"][task]:
        # What is logged is what the task wrote; the markers are the model's.
        assert [piece.is_memory for piece in split_spans(sample["arguments"][0][0], "it")] == [False]
    assert 0 <= results["results"][task][f"{LENGTH},none"] <= 1
