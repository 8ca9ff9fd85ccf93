"""What a part of the campaign counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Figures:
    """Counts of one part; `failures` says what broke a promise, each with the seed or number that repeats it.

    Attributes:
        part: Its name.
        counts: Label → how often it came out so.
        failures: What must not be.
        notes: What else was measured.
    """

    part: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """How many things were done."""
        return self.counts.total()

    def add(self, label: str, complaint: str | None = None) -> None:
        """Count one thing, and what was wrong with it."""
        self.counts[label] += 1
        if complaint is not None:
            self.failures.append(complaint)

    def line(self) -> str:
        """One line of the campaign's table."""
        said = ", ".join([*(f"{number} {label}" for label, number in sorted(self.counts.items())), *self.notes])
        return f"{self.part:<28} {self.tried:>6} tried: {said}; {len(self.failures)} failed"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "part": self.part,
            "tried": self.tried,
            "counts": dict(self.counts),
            "notes": self.notes,
            "failures": self.failures,
        }
