"""Bodies that are too large, and sessions that nobody uses."""

from __future__ import annotations

import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pacenote.rollout.server import SessionConfig

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

WAIT = 30
LIMIT = 10_000


@pytest.fixture(scope="module")
def served(serve: Callable[..., Served]) -> Iterator[Served]:
    """A session server that takes small bodies."""
    with serve(max_body=LIMIT) as served:
        yield served


def chat(size: int) -> bytes:
    """A chat of exactly so many bytes."""
    body = b'{"messages": [{"role": "user", "content": "%s"}]}'
    return body % (b"a" * (size - len(body) + 2))


def too_large(answer: httpx.Response) -> str:
    assert answer.status_code == 413, answer.text
    error = answer.json()["error"]
    assert (set(error), error["code"]) == ({"message", "type", "param", "code"}, "body_too_large")
    message: str = error["message"]
    return message


def test_bodies_up_to_the_limit(served: Served, engine: ScriptedEngine) -> None:
    with httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http:
        url = "/sessions/s/v1/chat/completions"
        assert http.post(url, content=chat(LIMIT)).status_code == 200
        assert "at most 10000 bytes (--max-body), got 10001 bytes" in too_large(http.post(url, content=chat(LIMIT + 1)))
        parts = [chat(LIMIT + 1)[start : start + 1000] for start in range(0, LIMIT + 1, 1000)]
        assert "got more" in too_large(http.post(url, content=iter(parts)))  # in chunks, of no announced length
        assert "got more" in too_large(http.post("/sessions/s/samples", content=iter(parts)))
        assert "got more" in too_large(http.post("/sessions/s/v1/tokenize", content=iter(parts)))
        assert http.get("/health").status_code == 200
    assert len(engine.bodies) == 1


@pytest.mark.parametrize("announced", [True, False])
def test_it_is_refused_before_it_has_come(served: Served, engine: ScriptedEngine, announced: bool) -> None:
    """A client that would send for ever is answered while it sends."""
    url = httpx.URL(served.url)
    length = "content-length: 1000000000000" if announced else "transfer-encoding: chunked"
    head = f"POST /sessions/s/v1/chat/completions HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80), timeout=WAIT) as client:
        client.sendall(head.encode())
        chunk = b"a" * 4096
        for _ in range(0 if announced else 3):
            client.sendall(b"1000\r\n" + chunk + b"\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert engine.bodies == []


def until(wanted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sessions_expire_unless_they_are_used(
    serve: Callable[..., Served], engine: ScriptedEngine, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    store = f"sqlite:{journal}"
    with (
        serve(session_ttl=0.4, store=store) as served,
        httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        body = {"messages": [{"role": "user", "content": "a"}]}
        idle, used, busy = (f"/sessions/{http.post('/sessions').json()['session_id']}" for _ in range(3))
        engine.hold()
        waiting = pool.submit(http.post, f"{busy}/v1/chat/completions", json=body)
        assert engine.arrived.acquire(timeout=WAIT)

        def idle_is_gone() -> bool:
            assert http.get(used).status_code == 200  # looking is use
            return not alive(journal, idle)

        until(idle_is_gone)
        answer = http.get(idle)
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "session_expired")
        assert "expired, unused too long" in answer.json()["error"]["message"]
        engine.release()
        assert waiting.result(WAIT).status_code == 200  # it took longer than the ttl
        until(lambda: not alive(journal, busy) and not alive(journal, used))
        assert http.get(busy).status_code == 410
    with serve(store=store) as served:
        for session in (idle, used, busy):
            answer = httpx.get(f"{served.url}{session}", trust_env=False)
            assert answer.json()["error"]["code"] == "session_expired"


def alive(journal: Path, session: str) -> bool:
    """Whether the journal says so; asking the server would be use."""
    with sqlite3.connect(f"file:{journal}?mode=ro", uri=True) as db:
        [[reason]] = db.execute("SELECT reason FROM session WHERE id = ?", (session.rpartition("/")[2],))
    return reason is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"session_ttl": 0.0}, "session ttl above 0 seconds, got 0.0"),
        ({"session_ttl": float("nan")}, "session ttl above 0 seconds, got nan"),
        ({"max_body": 0}, "max body of at least 1, got 0"),
        ({"workers": 0}, "number of workers of at least 1, got 0"),
        ({"store": "redis://x"}, "expected a store of memory or sqlite:PATH, got 'redis://x'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SessionConfig(model="m", upstream="http://x", **options)
