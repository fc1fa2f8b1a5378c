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

BACKLOG = 2048
HEAD = 64 << 10  # bytes of a request's head
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose heads have an end: uvicorn's own reads on for as long as one is sent."""

    _head: int | None = 0  # bytes of a head that has begun; None: none is awaited

    def data_received(self, data: bytes) -> None:
        """Read on; refuse a head of more than HEAD bytes."""
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > HEAD and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """It has ended."""
        self._head = None
        super().on_headers_complete()


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
        timeout_graceful_shutdown=math.ceil(drain),
        backlog=BACKLOG,
        http=_Protocol,
        log_config=None,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Server(options).serve(sockets=[listener]))
