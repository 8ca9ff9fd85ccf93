"""What an answer tells about a request's memory: for each span and in all.

    reports = span_reports(prompts, encoded)
    totals(reports)["text_rows"]

A span's characters are counted in Unicode characters, as Python does, from its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.model.prompt import MemoryPrompt, MemorySpan
from utils.serving.encoder_queue import EncodedSpan

# What stands around a span's latents and text.
MARKER_ROWS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanReport:
    """One span.

    Attributes:
        tokens: Encoder tokens.
        latents: Rows of latents that the decoder reads.
        text_rows: Rows of text that it reads in place of others.
        segments: The text: half-open ranges of characters, and their rows.
        frame_rows: Rows around them, which the plain text would not need: markers, and ids of segments.
        cached_tokens: Tokens whose latents came from the cache.
        milliseconds: Encoding time of the batch that it was in.
    """

    tokens: int
    latents: int = 0
    text_rows: int = 0
    segments: Sequence[tuple[Sequence[tuple[int, int]], int]] = ()
    frame_rows: int = 0
    cached_tokens: int = 0
    milliseconds: float = 0.0

    @property
    def rows(self) -> int:
        """All that the decoder reads of it."""
        return self.latents + self.text_rows + self.frame_rows

    @property
    def cached_rows(self) -> int:
        """Rows of latents that came from the cache; their share of the latents is that of their tokens."""
        return self.latents * self.cached_tokens // self.tokens if self.tokens else 0

    @classmethod
    def of(cls, span: MemorySpan, encoded: EncodedSpan) -> SpanReport:
        """Of a span as the decoder reads it."""
        return cls(
            tokens=encoded.num_tokens,
            latents=span.num_latents,
            text_rows=span.text_rows,
            segments=[(segment.chars, segment.rows[1] - segment.rows[0]) for segment in span.segments],
            frame_rows=MARKER_ROWS,
            cached_tokens=encoded.cached_tokens,
            milliseconds=encoded.milliseconds,
        )

    def to_json(self) -> dict[str, Any]:
        """What the API shows; `gain` is what the span saves against its tokens as text, 0 or less where nothing."""
        return {
            "tokens": self.tokens,
            "latents": self.latents,
            "text_rows": self.text_rows,
            "gain": self.tokens - self.rows,
            "cached_tokens": self.cached_tokens,
            "milliseconds": round(self.milliseconds, 2),
            "segments": [{"chars": [*map(list, chars)], "rows": rows} for chars, rows in self.segments],
        }


def span_reports(prompts: Sequence[MemoryPrompt], encoded: Sequence[EncodedSpan]) -> list[SpanReport]:
    """One report a span of all prompts, in order."""
    spans = [span for prompt in prompts for span in prompt.spans]
    return [SpanReport.of(span, own) for span, own in zip(spans, encoded, strict=True)]


def merged(parts: Sequence[SpanReport], num_characters: Sequence[int], num_parts: Sequence[int]) -> list[SpanReport]:
    """The reports of spans that were cut into parts.

    Args:
        parts: Of all spans, in order.
        num_characters: Of each part.
        num_parts: Of each span.
    """
    reports, at = [], 0
    for count in num_parts:
        own, begin, segments = parts[at : at + count], 0, []
        for part, length in zip(own, num_characters[at : at + count], strict=True):
            segments += [([(a + begin, b + begin) for a, b in chars], rows) for chars, rows in part.segments]
            begin += length
        reports.append(
            SpanReport(
                tokens=sum(part.tokens for part in own),
                latents=sum(part.latents for part in own),
                text_rows=sum(part.text_rows for part in own),
                segments=segments,
                frame_rows=sum(part.frame_rows for part in own),
                cached_tokens=sum(part.cached_tokens for part in own),
                milliseconds=max(part.milliseconds for part in own),
            )
        )
        at += count
    return reports


def totals(spans: Sequence[SpanReport]) -> dict[str, Any]:
    """The sums, and how many memory tokens stand behind each row."""
    tokens, latents = sum(span.tokens for span in spans), sum(span.latents for span in spans)
    text_rows = sum(span.text_rows for span in spans)
    return {
        "memory_tokens": tokens,
        "latents": latents,
        "text_rows": text_rows,
        "cached_tokens": sum(span.cached_tokens for span in spans),
        "compression_ratio": tokens / (latents + text_rows) if latents + text_rows else None,
        "encode_milliseconds": max((round(span.milliseconds, 2) for span in spans), default=0.0),
    }
