"""Agents that chat, and what they see: the load of the benchmark and of the soak."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import select
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import orjson

from benchmarks.scripted_engine import TEXT


class Connection:
    """One keep-alive HTTP connection.

    Args:
        port: on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        """(status, body) of an answer.

        Raises:
            ConnectionError: it broke off.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        reader, writer = self._streams
        try:
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            said = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = said.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            data = await (reader.readexactly(int(length)) if length else reader.read(-1))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise ConnectionError(f"it broke off: {error!r}") from error
        if not length or b"connection: close" in said:
            self.close()
        return int(said.split(b" ", 2)[1]), data

    async def leave(self) -> None:
        """Close it, and return once the other side can see that."""
        streams = self._streams
        self.close()
        if streams is not None:
            with contextlib.suppress(OSError):
                await streams[1].wait_closed()

    def close(self) -> None:
        """Close it; the next `ask` opens another."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


@dataclass
class Agent:
    """One session's client: each turn sends all messages so far and one more.

    Attributes:
        name: the session's id.
        words: words of each of its own messages, about a token each.
        messages: said so far, as JSON texts.
    """

    name: str
    words: int
    messages: list[bytes] = field(default_factory=list)

    def body(self, turn: int) -> bytes:
        """The chat body of a turn, from 0."""
        text = " ".join(f"{self.name[-4:]}{(turn * 31 + word) % 97}" for word in range(self.words))
        mine = orjson.dumps({"role": "user", "content": text})
        return b'{"messages":[' + b",".join([*self.messages, mine]) + b"]}"

    def heard(self, body: bytes) -> None:
        """Go on from the answer to a body."""
        answer = orjson.dumps({"role": "assistant", "content": TEXT})
        self.messages = [body[len(b'{"messages":[') : -len(b"]}")], answer]


@contextlib.asynccontextmanager
async def health_watched(port: int) -> AsyncIterator[list[float]]:
    """Ask for /health again and again, from a process of its own: this one is busy. Seconds, once it ends."""
    seen: list[float] = []
    command = [sys.executable, "-m", "benchmarks.session_load", str(port)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"\n", "the server is not well"
    try:
        yield seen
    finally:
        said, _ = await process.communicate(b"")
        seen += orjson.loads(said)


def _ask_for_health(port: int, every: float = 0.02) -> list[float]:
    """Until standard input ends."""
    seen: list[float] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    print(flush=True)  # it begins
    while not seen or not select.select([sys.stdin], [], [], every)[0]:
        began = time.perf_counter()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        seen.append(time.perf_counter() - began)
    return seen


if __name__ == "__main__":
    print(orjson.dumps(_ask_for_health(int(sys.argv[1]))).decode())
