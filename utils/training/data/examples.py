"""What a task makes, and what it makes it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from utils.model.markers import wrap
from utils.training.data.excerpts import SizeRange, cut_excerpt, draw_file
from utils.training.data.sources import SourceFile

NO_FILES: tuple[SourceFile, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One training or evaluation example.

    Attributes:
        task: Name in `TASKS`.
        memory: The text that is compressed.
        question: What is asked about it; empty for plain text.
        answer: What the decoder is to write: the target, or the text after the memory.
        source: File and licence behind it.
        kind: Finer kind of the task, for reports.
        more: Questions and answers that follow in the same chat; evaluation asks the first question only.
        question_first: The question stands before the memory, not after it.
    """

    task: str
    memory: str
    question: str
    answer: str
    source: str = ""
    kind: str = ""
    more: tuple[tuple[str, str], ...] = ()
    question_first: bool = False

    def messages(self, memory: str | None = None) -> list[dict[str, str]]:
        """The chat, with the marked memory or another text in its place."""
        shown = wrap(self.memory) if memory is None else memory
        parts = (self.question, shown) if self.question_first else (shown, self.question)
        return [{"role": "user", "content": "\n".join(parts)}]

    def row(self) -> dict[str, Any]:
        """The JSONL form."""
        row: dict[str, Any] = {"task": self.task, "kind": self.kind, "source": self.source}
        if self.more:
            turns = [*self.messages(), {"role": "assistant", "content": self.answer}]
            for question, answer in self.more:
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return row | {"messages": turns}
        if self.question:
            return row | {"messages": self.messages(), "target": self.answer}
        return row | {"text": f"{wrap(self.memory)}{self.answer}"}


@dataclass(frozen=True, slots=True)
class Material:
    """What a task draws from.

    Attributes:
        random: Of all draws.
        files: Source files.
        size: How long memories are.
        answers: Ordinary question → what the decoder answers to it untrained (`chat.py`).
    """

    random: Random
    files: Sequence[SourceFile] = NO_FILES
    size: SizeRange = field(default_factory=lambda: SizeRange(shortest=64, longest=256))
    answers: Mapping[str, str] = field(default_factory=dict)

    def draw_code(self, num_chars: int | None = None) -> tuple[SourceFile, str]:
        """A file and an excerpt of it."""
        file = draw_file(self.random, self.files)
        lines = file.text.splitlines(keepends=True)
        return file, cut_excerpt(self.random, lines, num_chars or self.size.draw_chars(self.random))
