"""One line a request, with ids and without content; and one a chat that was answered."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pacenote.rollout import tracing
from pacenote.rollout.observed import Observed

CODE = "pacenote.code"
"""Where in a request's scope the code of its error stands."""
FORMATS = ("off", "text", "json")
_GIVEN = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_SPACED = re.compile(r"[\s\"]")
_SESSION = re.compile(r"/sessions/([^/]{1,256})")
_current: ContextVar[str] = ContextVar("request_id", default="")
log = logging.getLogger("pacenote.requests")


def request_id() -> str:
    """Of the request that is being answered; "" outside of one."""
    return _current.get()


class RequestLog:
    """ASGI: gives each request an id (its own `x-request-id` if that is a plain word), tells it back, writes a line.

    Args:
        app: what is logged.
        failed: told the status and the code of each error.
    """

    def __init__(self, app: ASGIApp, failed: Callable[[int, str | None], None]) -> None:
        self._app = app
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _GIVEN.fullmatch(given) else uuid.uuid4().hex
        token, began, status = _current.set(name), time.perf_counter(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            with tracing.continued(dict(headers)):
                await self._app(scope, receive, named)
        finally:
            _current.reset(token)
            if status >= 400:
                self._failed(status, scope.get(CODE))
            if scope["path"] not in ("/health", "/metrics") or status >= 400:
                self._line(scope, name, status, time.perf_counter() - began)

    def _line(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        found = _SESSION.match(scope["path"])
        session = {"session_id": found[1]} if found else {}
        path = scope["path"][:300]
        fields = {"request_id": name, **session, "method": scope["method"], "path": path, "status": status}
        level = logging.ERROR if status >= 500 or not status else logging.INFO
        log.log(level, "request", extra={"fields": {**fields, "ms": round(seconds * 1e3, 1)}})


def answered(seen: Observed, *, content: bool = False) -> None:
    """A line of an answered chat; with what was said if `content`."""
    if log.isEnabledFor(logging.INFO):
        said = seen.content() if content else {}
        log.info("chat", extra={"fields": {"request_id": request_id(), **seen.fields(), **said}})


class Lines(logging.Formatter):
    """Lines of JSON, or of `name=value`.

    Args:
        json: which of them.
    """

    def __init__(self, *, json: bool) -> None:
        super().__init__()
        self._json = json

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        fields |= getattr(record, "fields", {})
        if record.name != log.name:
            fields["logger"] = record.name
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        if self._json:
            return orjson.dumps(fields, default=str).decode()
        return " ".join(f"{name}={_word(name, str(value))}" for name, value in fields.items())


def _word(name: str, value: str) -> str:
    """A value that ends where it seems to: a path may hold line ends and what looks like other fields."""
    if name == "error":  # of a traceback, which has lines
        return value
    plain = value.isprintable() and (name == "event" or not _SPACED.search(value))
    return value if plain else json.dumps(value)


class _Stderr(logging.Handler):
    """Writes to what is stderr at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def configure(kind: str) -> None:
    """Log to stderr in one of FORMATS; "off" leaves warnings and errors of everything else as Python writes them."""
    log.propagate = False
    log.handlers.clear()
    log.setLevel(logging.CRITICAL + 1 if kind == "off" else logging.INFO)
    if kind == "off":
        return
    handler = _Stderr()
    handler.setFormatter(Lines(json=kind == "json"))
    log.addHandler(handler)
    root = logging.getLogger()
    root.handlers[:] = [handler]
