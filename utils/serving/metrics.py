"""What `/metrics` shows, in prometheus' format; one registry a gateway, so that several can live in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from utils.serving.report import SpanReport

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "code_llava_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=self.registry
        )
        self._spans = Counter("code_llava_spans", "Memory spans compressed", registry=self.registry)
        self._tokens = Counter("code_llava_memory_tokens", "Encoder tokens in them", registry=self.registry)
        self._cached = Counter("code_llava_cached_tokens", "Of these, from the cache", registry=self.registry)
        self._latents = Counter("code_llava_latents", "Latents sent in their place", registry=self.registry)
        self._text_rows = Counter("code_llava_text_rows", "Rows of memory kept as text", registry=self.registry)
        self._expanded = Counter("code_llava_expanded_requests", "Requests with such rows", registry=self.registry)
        self.fallbacks = Counter("code_llava_fallbacks", "Requests sent as plain text", registry=self.registry)
        self._batch_requests = Histogram(
            "code_llava_batch_requests", "Requests encoded together", buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "code_llava_batch_seconds", "Seconds of an encoder batch", buckets=_SECONDS, registry=self.registry
        )
        self.active = Gauge("code_llava_active_requests", "Requests in work", registry=self.registry)

    def watch_queue(self, num_waiting: Callable[[], int]) -> None:
        """Show the encoder queue's length."""
        gauge = Gauge("code_llava_waiting_requests", "Requests that wait for the encoder", registry=self.registry)
        gauge.set_function(num_waiting)

    def note_batch(self, num_requests: int, seconds: float) -> None:
        """Count one encoder batch."""
        self._batch_requests.observe(num_requests)
        self._batch_seconds.observe(seconds)

    def note_spans(self, spans: Sequence[SpanReport]) -> None:
        """Count one request's spans."""
        text_rows = sum(span.text_rows for span in spans)
        self._spans.inc(len(spans))
        self._tokens.inc(sum(span.tokens for span in spans))
        self._cached.inc(sum(span.cached_tokens for span in spans))
        self._latents.inc(sum(span.latents for span in spans))
        self._text_rows.inc(text_rows)
        self._expanded.inc(text_rows > 0)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
