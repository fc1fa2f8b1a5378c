"""The dialects over HTTP: bodies that nobody should send, limits and keys, each in the dialect's own shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

PATHS = ("messages", "messages/count_tokens", "responses")
LIMIT = 1 << 20
ADMIN = "an-admin-token-of-mine"
USER = b'{"max_tokens": 4, "messages": [{"role": "user", "content": "hi"}], "input": "hi"'


@pytest.fixture(scope="module")
def url(serve: Callable[..., Served]) -> Iterator[str]:
    """A server with tokens and a limit."""
    with serve(auth="tokens", tokens=(ADMIN,), max_body=LIMIT) as served:
        yield served.url


@pytest.fixture
def http(url: str, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    """A client with a session's key, sent as Anthropic's SDK does, at the session's `/v1/`."""
    made = httpx.post(f"{url}/sessions", headers={"x-api-key": ADMIN}, trust_env=False).json()
    with httpx.Client(
        base_url=f"{url}/sessions/{made['session_id']}/v1/", headers={"x-api-key": made["api_key"]}, trust_env=False
    ) as client:
        yield client


def kind(answer: httpx.Response) -> str:
    """The type of an error, whose shape is that of the path's dialect."""
    body = answer.json()
    assert body["error"]["message"]
    if "messages" in answer.url.path:
        assert body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body["error"].keys() == {"type", "message", "param", "code"}
    name: str = body["error"]["type"]
    return name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"{}",
        USER + b', "stream": 1}',
        USER + b', "tools": 1}',
        USER + b', "temperature": ' + b"9" * 30 + b"}",
        USER + b', "logit_bias": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"max_tokens": 4, "messages": [{"role": "user", "content": "\\ud800"}], "input": "\\ud800"}',
    ],
    ids=range(11),
)  # fmt: skip
def test_a_body_that_cannot_be(http: httpx.Client, engine: ScriptedEngine, path: str, body: bytes) -> None:
    answer = http.post(path, content=body)
    assert (answer.status_code, kind(answer)) == (400, "invalid_request_error")
    assert engine.bodies == []


@pytest.mark.parametrize("path", PATHS)
def test_a_sessions_key_opens_them(http: httpx.Client, path: str) -> None:
    assert http.post(path, content=USER + b"}").status_code == 200
    assert http.post(path, content=USER + b"}", headers={"x-api-key": "another"}).status_code == 401
    assert http.get(path).status_code == 405


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_too_large(http: httpx.Client, path: str) -> None:
    """Found out while it comes: its length was not announced."""

    def parts() -> Iterator[bytes]:
        yield from [b" " * (LIMIT // 2)] * 3

    answer = http.post(path, content=parts())
    assert answer.status_code == 413
    assert kind(answer) == ("request_too_large" if "messages" in path else "invalid_request_error")
