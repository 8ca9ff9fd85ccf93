"""Asks a backend the rows of one task: bounded concurrency, failures kept apart.

A row ends in one of two ways: its answer is in the prediction file, or it is among the returned failures and the next
run asks it again. Nothing is lost in between, whatever the server does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ruler.answering.predictions import DataRow, PredictionFile, prediction_row
from ruler.answering.protocol import Answer, Backend, Question, RowRefusedError, TransientError
from utils.errors import PromptError, ServerError

logger = logging.getLogger(__name__)

_GIVE_UP_AFTER = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRow:
    """A row without an answer, and why."""

    row: int
    index: int
    error: str


async def ask(
    backend: Backend,
    file: PredictionFile,
    rows: Sequence[DataRow],
    *,
    max_tokens: int,
    measure: Callable[[DataRow], dict[str, Any]] = lambda row: {},
    keep_input: bool = False,
    on_row: Callable[[], object] = lambda: None,
) -> list[FailedRow]:
    """Ask rows and store their answers in an open prediction file.

    Args:
        backend: Who answers.
        file: Gets each answer as soon as it is there.
        rows: The rows to ask, of those the file is missing.
        max_tokens: New tokens a row.
        measure: What to note about a row beside the answer's counts.
        keep_input: Repeat the prompt in the prediction.
        on_row: Called after each row, answered or not.

    Returns:
        The rows that failed, in the dataset's order.

    Raises:
        ServerError: The server refuses everything (wrong key, wrong model), or rows fail one after the other.
    """
    failed: list[FailedRow] = []
    failed_in_a_row = 0

    async def worker(batches: Iterator[Sequence[DataRow]]) -> None:
        nonlocal failed_in_a_row
        for batch in batches:
            outcomes = await _ask_batch(backend, batch, max_tokens)
            for row, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, Answer):
                    measured = {**measure(row), **outcome.counts()}
                    file.append(prediction_row(row, outcome.text, measured, keep_input=keep_input))
                    failed_in_a_row = 0
                else:
                    logger.warning("row %d failed: %s", row.number, outcome)
                    failed.append(FailedRow(row=row.number, index=row.fields["index"], error=str(outcome)))
                    failed_in_a_row += isinstance(outcome, TransientError)
                on_row()
            if failed_in_a_row >= _GIVE_UP_AFTER:
                raise ServerError(
                    f"{failed_in_a_row} rows failed one after the other; the last: {failed[-1].error} "
                    "(finished rows are kept: start again to go on)"
                )

    # One shared iterator: each worker takes the next batch when it is free.
    size = backend.batch_size
    batches = iter([rows[start : start + size] for start in range(0, len(rows), size)])
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(backend.concurrency):
                group.create_task(worker(batches))
    except ExceptionGroup as errors:
        # The first one stopped the others.
        raise errors.exceptions[0] from None
    return sorted(failed, key=lambda failure: failure.row)


async def _ask_batch(
    backend: Backend, batch: Sequence[DataRow], max_tokens: int
) -> Sequence[Answer | ServerError | PromptError]:
    """Ask a batch; one that is refused is asked row by row."""
    try:
        return await backend.answer([_question(row, max_tokens) for row in batch])
    except TransientError as error:
        return [error] * len(batch)
    except (RowRefusedError, PromptError) as error:
        if len(batch) == 1:
            return [error]
        return [(await _ask_batch(backend, [row], max_tokens))[0] for row in batch]


def _question(row: DataRow, max_tokens: int) -> Question:
    fields = row.fields
    return Question(
        input=fields["input"],
        answer_prefix=fields.get("answer_prefix", ""),
        # Rows of the reference do not say where their context is; only memory backends need it.
        context_start=fields.get("context_start", 0),
        context_end=fields.get("context_end", 0),
        max_tokens=max_tokens,
    )
