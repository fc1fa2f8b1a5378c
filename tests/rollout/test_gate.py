"""The gate in front of a process that answers before it has read, and goes."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import uvloop

from pacenote.rollout.gate import Gate

ANSWER = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 5\r\nconnection: close\r\n\r\nlarge"


@pytest.fixture
def hasty() -> Iterator[Path]:
    """A process that answers whoever comes without reading a byte, and closes."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "process"
        listener.bind(str(path))
        listener.listen(100)

        def answer() -> None:
            while True:
                try:
                    met, _ = listener.accept()
                except OSError:
                    return
                with met:
                    met.sendall(ANSWER)

        thread = threading.Thread(target=answer)
        thread.start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_answer_that_came_before_the_request_was_read_is_passed_on(hasty: Path, loop: type) -> None:
    """Writing to a process that has gone fails, and what it had said before must not go with that."""

    async def answers() -> list[bytes]:
        listener = socket.create_server(("127.0.0.1", 0))
        server = await Gate([hasty]).serve(listener)
        found = []
        for _ in range(60):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"POST /sessions/a HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n" + bytes(1_000_000))
            found.append(await reader.read(-1))
            writer.close()
        server.close()
        return found

    with asyncio.Runner(loop_factory=loop) as runner:
        found = runner.run(answers())
    assert set(found) == {ANSWER}
