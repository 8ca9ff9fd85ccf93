"""What a task makes, and what it makes it from."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from utils.model.markers import wrap
from utils.training.config import DataConfig
from utils.training.data.excerpts import excerpt_range
from utils.training.data.scatter import Stretch
from utils.training.data.sources import SourceFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One training or evaluation example.

    Attributes:
        memory: The text that is compressed.
        question: What is asked about it; empty for plain text.
        answer: What the decoder is to write: the target, or the text after the memory.
        task: Its task; the builder fills it in.
        source: File and licence behind it.
        kind: Finer kind of the task, for reports.
        more: Questions and answers that follow in the same chat; evaluation asks the first question only.
        question_first: The question stands before the memory, not after it.
        stretches: The memory dealt out over the prompt; empty where it is one span.
        asked_after: Stretches that stand before the question.
    """

    memory: str
    question: str
    answer: str
    task: str = ""
    source: str = ""
    kind: str = ""
    more: tuple[tuple[str, str], ...] = ()
    question_first: bool = False
    stretches: tuple[Stretch, ...] = ()
    asked_after: int = 0

    def messages(self, memory: str | None = None) -> list[dict[str, str]]:
        """The chat, with the marked memory or another text in its place."""
        if self.stretches and memory is None:
            parts = [stretch.shown for stretch in self.stretches]
            parts.insert(self.asked_after, self.question)
        else:
            shown = wrap(self.memory) if memory is None else memory
            parts = [self.question, shown] if self.question_first else [shown, self.question]
        # Added, not joined: what is wrapped must stay so whatever it holds.
        content = functools.reduce(lambda before, part: before + "\n" + part, parts)
        return [{"role": "user", "content": content}]

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
        stretches = self.stretches or (Stretch(self.memory, True),)
        before = "".join(wrap(stretch.text) if stretch.is_memory else stretch.text for stretch in stretches)
        return row | {"text": f"{before}{self.answer}"}


@dataclass(frozen=True, slots=True)
class TaskSources:
    """What a task draws from.

    Attributes:
        random: Of all draws.
        files: Source files.
        data: How long memories are.
        answers: Ordinary question → what the decoder answers to it untrained (`chat.py`).
        num_chars: How long all memories are, in characters; None: each length is drawn.
    """

    random: Random
    files: Sequence[SourceFile]
    data: DataConfig
    answers: Mapping[str, str] = field(default_factory=dict)
    num_chars: int | None = None

    def draw_chars(self) -> int:
        """A memory's length in characters, drawn evenly over the logarithm, so that short ones are not rare."""
        if self.num_chars is not None:
            return self.num_chars
        shortest, longest = self.data.memory_tokens
        tokens = shortest * (longest / shortest) ** self.random.random()
        return max(1, round(tokens * self.data.chars_per_token))

    def draw_file(self) -> tuple[SourceFile, list[str]]:
        """A file and its lines; longer ones as often as shorter ones, so that no package's giants dominate."""
        file = self.files[self.random.randrange(len(self.files))]
        return file, file.lines

    def draw_code(self, num_chars: int | None = None) -> tuple[SourceFile, str]:
        """A file, and whole lines of it from a random place."""
        file, lines = self.draw_file()
        num_chars = num_chars or self.draw_chars()
        start, stop = excerpt_range(lines, self.random.randrange(len(lines)), num_chars)
        return file, "".join(lines[start:stop])
