"""One port in front of several server processes: each connection goes to the process that holds its session.

The gate reads the head of a request, picks the process by the session id in the path, and from then on only copies
bytes, both ways, as they come. A connection carries one request: what follows it could be another session's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import httptools
import orjson

from pacenote.rollout.metrics import CONTENT_TYPE, add_up
from pacenote.rollout.share import place

HEAD = 64 << 10  # bytes of a request's head
PATIENCE = 60.0  # seconds for it to come
LINGER = 2.0  # seconds that a client has to read an answer that came before its request ended
_CHUNK = 1 << 16
_SESSION = re.compile(r"/sessions/([^/]+)", re.DOTALL)
_HOP = (b"connection", b"keep-alive", b"proxy-connection", b"upgrade")


class _Refusal(Exception):
    """A request that no process sees."""

    def __init__(self, status: str, code: str, message: str) -> None:
        super().__init__(message)
        self.answer = refusal(status, code, message)


def refusal(status: str, code: str, message: str) -> bytes:
    """A whole answer in OpenAI's shape, for what never becomes a request; the connection ends with it."""
    kind = "server_error" if status.startswith("5") else "invalid_request_error"
    body = orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body


class Gate:
    """The listener.

    Args:
        sockets: Unix sockets of the processes, in the order of their numbers.
    """

    def __init__(self, sockets: Sequence[Path]) -> None:
        self._sockets = list(sockets)
        self._next = itertools.count()

    async def serve(self, listener: socket.socket) -> asyncio.Server:
        """Answer from now on; closing what is returned lets nobody new in, and what is in flight go on."""
        return await asyncio.start_server(self._client, sock=listener, limit=HEAD, backlog=2048)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            try:
                async with asyncio.timeout(PATIENCE):
                    head = await reader.readuntil(b"\r\n\r\n")
                path, head = read_head(head)
                if path == "/metrics":
                    await _say(reader, writer, await self._metrics(head))
                else:
                    await self._pass_on(path, head, reader, writer)
            except asyncio.LimitOverrunError:
                message = f"the request's head is above {HEAD} bytes"
                await _say(reader, writer, refusal("431 Too Large", "bad_request", message))
            except _Refusal as refused:
                await _say(reader, writer, refused.answer)
        writer.close()

    async def _pass_on(
        self, path: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Copy both ways."""
        with await self._connect(path) as process:
            if not await _splice(reader, writer, process, head):
                raise _down("it ended before it had answered")

    async def _metrics(self, head: bytes) -> bytes:
        """All processes' metrics added up; the first answer that is not 200 as it is."""
        texts = []
        for path in self._sockets:
            answer = await _ask(path, head)
            said, _, text = answer.partition(b"\r\n\r\n")
            if not said.startswith(b"HTTP/1.1 200 "):
                return answer
            texts.append(text)
        body = await asyncio.to_thread(add_up, texts)
        start = f"HTTP/1.1 200 OK\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\n"
        return f"{start}connection: close\r\n\r\n".encode() + body

    async def _connect(self, path: str) -> socket.socket:
        """The process that holds the path's session; for a path without one, each in turn.

        A process that is down makes /health fail, and others answer what any could.
        """
        found = _SESSION.match(path)
        count = len(self._sockets)
        first = place(found[1], count) if found else next(self._next) % count
        tries = 1 if found or path == "/health" else count
        for index in range(first, first + tries):
            with contextlib.suppress(OSError):
                return await _connected(self._sockets[index % count])
        raise _down(f"number {first} of {count}")


async def _connected(path: Path) -> socket.socket:
    """A connection to a process, without a transport: one whose writing fails would forget what has come to be read."""
    process = socket.socket(socket.AF_UNIX)
    try:
        process.setblocking(False)
        await asyncio.get_running_loop().sock_connect(process, str(path))
    except BaseException:
        process.close()
        raise
    return process


async def _ask(path: Path, head: bytes) -> bytes:
    """A process's whole answer to a request without a body."""
    loop = asyncio.get_running_loop()
    try:
        process = await _connected(path)
    except OSError as error:
        raise _down(f"socket {path.name}") from error
    parts = []
    with process:
        try:
            await loop.sock_sendall(process, head)
            while data := await loop.sock_recv(process, _CHUNK):
                parts.append(data)
        except ConnectionError as error:  # what has come is not all of it
            raise _down(f"socket {path.name}") from error
    if not parts:
        raise _down(f"socket {path.name}")
    return b"".join(parts)


def read_head(head: bytes) -> tuple[str, bytes]:
    """(decoded path, head to send on) of a request's head; the same reading as the processes' own.

    Raises:
        _Refusal: no head of HTTP/1.
    """
    first, *lines = head[:-4].split(b"\r\n")
    try:
        method, target, version = first.split(b" ")
        if not version.startswith(b"HTTP/1."):
            raise ValueError(version)
        path = unquote((httptools.parse_url(target).path or b"").decode("ascii"))
    except (ValueError, httptools.HttpParserInvalidURLError) as error:
        raise _Refusal("400 Bad Request", "bad_request", "expected a request of HTTP/1.1") from error
    kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in _HOP]
    return path, b"\r\n".join([b" ".join((method, target, version)), *kept, b"connection: close", b"", b""])


def _down(which: str) -> _Refusal:
    message = f"a process of this server is down ({which}) and is being started again: try again soon"
    return _Refusal("503 Service Unavailable", "worker_unavailable", message)


async def _say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes) -> None:
    """An answer of our own, perhaps before the request has come to its end."""
    writer.write(answer)
    await writer.drain()
    await _linger(writer, asyncio.create_task(_throw_away(reader)))


async def _linger(writer: asyncio.StreamWriter, up: asyncio.Task[None]) -> None:
    """Let the client send the rest of its request: closed with something unread, its side would forget the answer."""
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()
    try:
        await asyncio.wait({up}, timeout=LINGER)
    finally:
        up.cancel()
        await asyncio.gather(up, return_exceptions=True)


async def _throw_away(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(_CHUNK):
            pass


async def _splice(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: socket.socket, head: bytes
) -> bool:
    """Copy both ways until the process has answered, or the client has left: then the process sees it leave.

    Returns:
        False if the process ended without a word to a client that waits.
    """
    up = asyncio.create_task(_copy_up(reader, process, head))
    down = asyncio.create_task(_copy_down(process, writer))
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if not down.done():
            return True
        if answered := bool(down.result()):
            await _linger(writer, up)
        return answered
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _copy_up(reader: asyncio.StreamReader, process: socket.socket, head: bytes) -> None:
    """The request, until the client ends it; what a process that has gone does not take is thrown away."""
    loop = asyncio.get_running_loop()
    data = head
    with contextlib.suppress(ConnectionError):
        while data:
            try:
                await loop.sock_sendall(process, data)
            except OSError:
                await _throw_away(reader)
                return
            data = await reader.read(_CHUNK)


async def _copy_down(process: socket.socket, writer: asyncio.StreamWriter) -> int:
    """The answer, until the process ends it; returns bytes. A client that has gone is left alone."""
    loop = asyncio.get_running_loop()
    count = 0
    with contextlib.suppress(ConnectionError):
        while data := await loop.sock_recv(process, _CHUNK):
            count += len(data)
            with contextlib.suppress(ConnectionError, RuntimeError):
                writer.write(data)
                await writer.drain()
    return count
