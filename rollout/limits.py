"""What one request, and one session that nobody uses, may take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pacenote.rollout.errors import BodyTooLarge, StoreError
from pacenote.rollout.request_log import CODE
from pacenote.rollout.store import SessionStore

SLOWEST_SWEEP = 30.0  # seconds
log = logging.getLogger(__name__)


class BodyLimit:
    """ASGI: refuses a body as soon as it is known to be too large, before the rest of it has come.

    Args:
        app: what is protected.
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 by the length that is announced, or count what comes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._limit:
            # The rest of the body is on its way: the connection cannot be used for another request.
            error = self._error(f"{int(announced)} bytes")
            scope[CODE] = error.code
            await JSONResponse(error.body(), error.status, {"connection": "close"})(scope, receive, send)
            return
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self._limit:
                raise self._error("more")
            return message

        await self._app(scope, counted, send)

    def _error(self, got: str) -> BodyTooLarge:
        return BodyTooLarge(f"expected a body of at most {self._limit} bytes (--max-body), got {got}")


async def sweep(
    store: SessionStore, ttl: float, busy: Callable[[], Collection[str]], forget: Callable[[str], None]
) -> None:
    """Forget sessions that were not used for `ttl` seconds, until cancelled.

    Args:
        store: where they live.
        ttl: seconds.
        busy: ids of sessions with work in flight; that is use.
        forget: called with each id that has expired.
    """
    while True:
        await asyncio.sleep(min(ttl / 4, SLOWEST_SWEEP))
        try:
            expired = await store.expire(ttl, busy())
        except StoreError as error:
            log.warning("sessions could not be expired: %s", error)
        else:
            for session_id in expired:
                forget(session_id)
            if expired:
                log.info("%d sessions expired", len(expired))
