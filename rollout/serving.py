"""An ASGI application on a listening socket, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
import uvloop
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pacenote.rollout.gate import HEAD, refusal

BACKLOG = 2048


class _Connection(HttpToolsProtocol):
    """uvicorn's, with a bound on heads and trailers, which are kept in memory whole: nobody has shown a key yet."""

    _unread = 0  # bytes that came since there was a whole head, or a part of a body

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD and not self.transport.is_closing():
            if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
                message = f"the request's head is above {HEAD} bytes"
                self.transport.write(refusal("431 Too Large", "bad_request", message))
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)


class _Server(uvicorn.Server):
    """uvicorn that ends quietly on SIGTERM and SIGINT."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        yield

    def _end(self) -> None:
        self.should_exit = True


def run(app: ASGIApp, listener: socket.socket, *, drain: float = 0.0) -> None:
    """Answer on a socket that listens already, until SIGTERM or SIGINT, and `drain` seconds more what is in flight."""
    # Seconds after which a thread that computes gives the loop its turn.
    sys.setswitchinterval(0.002)
    # What has been loaded stays: no collection has to look through it again, nor often through what sessions hold.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)
    options = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        http=_Connection,
        timeout_graceful_shutdown=math.ceil(drain),
        backlog=BACKLOG,
        log_config=None,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Server(options).serve(sockets=[listener]))
