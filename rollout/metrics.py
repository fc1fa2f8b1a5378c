"""What the server counts, in Prometheus's text format (prometheus.io/docs/instrumenting/exposition_formats)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from pacenote.rollout.observed import Observed

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MILLISECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_SECONDS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)


class Metrics:
    """One process's counts. The gate adds up those of several.

    Args:
        in_flight: chats that are being answered now.
        sessions: sessions that are held now.
        held: bytes of their turns.
        store_bytes: size of the journal on disk; None without one.
    """

    def __init__(
        self,
        *,
        in_flight: Callable[[], int],
        sessions: Callable[[], int],
        held: Callable[[], int],
        store_bytes: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"pacenote_{name}", about, labels, registry=registry)

        self._turns = counter("turns", "Answered choices, by how they ended.", "finish")
        self._tokens = counter("tokens", "Tokens of answered chats, by kind: prompt, generated.", "kind")
        self._rows = counter("rows", "Routing rows that engines sent.")
        self._missing = counter("rows_missing", "Routing rows that cannot be replayed.")
        self._errors = counter("errors", "Requests that were refused or failed, by status and code.", "status", "code")
        self._own = Histogram(
            "pacenote_own_seconds", "Time of a chat that is not the engine's.", buckets=_MILLISECONDS, registry=registry
        )
        self._engine = Histogram(
            "pacenote_engine_seconds", "Time of a chat in the engine.", buckets=_SECONDS, registry=registry
        )
        Gauge("pacenote_in_flight", "Chats that are being answered.", registry=registry).set_function(in_flight)
        Gauge("pacenote_sessions", "Sessions that are held.", registry=registry).set_function(sessions)
        turns = Gauge("pacenote_held_bytes", "Bytes of the turns that are held.", registry=registry)
        turns.set_function(held)
        if store_bytes() is not None:
            stored = Gauge("pacenote_store_bytes", "Size of the journal on disk.", registry=registry)
            stored.set_function(lambda: store_bytes() or 0)

    def answered(self, seen: Observed) -> None:
        """Count an answered chat."""
        for turn in seen.turns:
            self._turns.labels(turn.answer.finish).inc()
        self._tokens.labels("prompt").inc(seen.prompt_tokens)
        self._tokens.labels("generated").inc(seen.generated_tokens)
        self._rows.inc(seen.rows)
        self._missing.inc(seen.rows_missing)
        self._own.observe(seen.own_seconds)
        self._engine.observe(seen.engine_seconds)

    def failed(self, status: int, code: str | None) -> None:
        """Count a request that was answered with an error."""
        self._errors.labels(str(status), code or "none").inc()

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)


class _Sum(Collector):
    """The same metrics of several processes, added up."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._families: dict[str, Metric] = {}
        self._values: dict[tuple[str, str, tuple[Any, ...]], float] = {}
        for text in texts:
            for family in text_string_to_metric_families(text):
                self._families.setdefault(family.name, family)
                for sample in family.samples:
                    key = family.name, sample.name, tuple(sorted(sample.labels.items()))
                    first = sample.name.endswith("_created")  # a time: the oldest
                    old = self._values.get(key)
                    value = sample.value if old is None else min(old, sample.value) if first else old + sample.value
                    self._values[key] = value

    def collect(self) -> Iterator[Metric]:
        """Each family with the sums of its samples."""
        for name, family in self._families.items():
            summed = Metric(name, family.documentation, family.type)
            for (owner, sample, labels), value in self._values.items():
                if owner == name:
                    summed.add_sample(sample, dict(labels), value)
            yield summed


def add_up(texts: Iterable[bytes]) -> bytes:
    """The metrics of several processes as those of one.

    Raises:
        ValueError: not in the text format.
    """
    registry = CollectorRegistry()
    registry.register(_Sum(text.decode() for text in texts))
    return generate_latest(registry)
