"""Spans of OpenTelemetry, where its API is installed; without an SDK set up by the process they cost next to nothing.

opentelemetry-instrument --service_name sessions pacenote serve ...
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

trace: Any = None
propagate: Any = None
with suppress(ImportError):
    from opentelemetry import propagate, trace


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """A span around what is done inside; errors are marked in it."""
    if trace is None:
        yield
        return
    with trace.get_tracer("pacenote").start_as_current_span(f"pacenote.{name}", attributes=attributes):
        yield


@contextmanager
def continued(headers: MutableMapping[str, str]) -> Iterator[None]:
    """Spans inside belong to the trace that a request's headers (`traceparent`) name."""
    if trace is None or "traceparent" not in headers:
        yield
        return
    from opentelemetry import context

    token = context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        context.detach(token)


def outgoing() -> dict[str, str]:
    """Headers that let the engine's spans join the trace."""
    headers: dict[str, str] = {}
    if trace is not None:
        propagate.inject(headers)
    return headers
