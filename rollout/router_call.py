"""One call to a router, bounded in time and size whatever the other side does."""

from __future__ import annotations

import time
from typing import Any

import httpx
import orjson

from pacenote.rollout.router_dialects import Call
from pacenote.rollout.worker_errors import RouterError

LARGEST = 64 << 20  # bytes of an answer


class Answer:
    """A router's answer.

    Attributes:
        status: HTTP status.
        text: the body.
        location: of the header, or "".
    """

    def __init__(self, status: int, body: bytes, location: str) -> None:
        self.status = status
        self.text = body.decode(errors="replace")
        self.location = location

    @property
    def ok(self) -> bool:
        """2xx."""
        return 200 <= self.status < 300

    @property
    def short(self) -> str:
        """Status and the start of the body, for a message."""
        return f"{self.status} {' '.join(self.text.split())[:300]!r}"

    def json(self) -> Any:
        """The body as JSON; None if it is not."""
        try:
            return orjson.loads(self.text)
        except orjson.JSONDecodeError:
            return None


def call(client: httpx.Client, asked: Call, *, timeout: float) -> Answer:
    """Send it, once.

    Args:
        client: with the router's base URL.
        timeout: seconds for all of it. An answer that comes in drops is cut off, too, which a read timeout does not do.

    Raises:
        RouterError: no answer, none in time, or too large a one.
    """
    where = f"{asked.method} {str(client.base_url).rstrip('/')}{asked.path}"
    deadline, body = time.monotonic() + timeout, bytearray()
    try:
        with client.stream(asked.method, asked.path, json=asked.body, timeout=timeout) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise RouterError(f"the router's answer to {where} was not complete after {timeout:g} s")
                if len(body) > LARGEST:
                    raise RouterError(f"the router's answer to {where} is larger than {LARGEST >> 20} MiB")
            return Answer(response.status_code, bytes(body), response.headers.get("location", ""))
    except httpx.TimeoutException as error:
        raise RouterError(f"the router did not answer {where} within {timeout:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RouterError(f"no answer from the router to {where}: {error or type(error).__name__}") from error
