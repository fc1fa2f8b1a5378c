"""Admin tokens and sessions' keys: who reaches what."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.rollout.auth import Keys, read_tokens
from pacenote.rollout.server import SessionConfig

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

ADMIN, OTHER = "an-admin-token-of-mine", "another-admin-token-here"
USER = {"role": "user", "content": "a"}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., Served]) -> Iterator[Served]:
    """A session server that asks for tokens."""
    with serve(auth="tokens", tokens=(ADMIN, OTHER), served_model="tiny") as served:
        yield served


@pytest.fixture
def http(guarded: Served, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    """A client without a token."""
    with httpx.Client(base_url=guarded.url, timeout=30, trust_env=False) as client:
        yield client


def start(http: httpx.Client, token: str = ADMIN) -> tuple[str, str]:
    """(path, key) of a new session."""
    answer = http.post("/sessions", headers=bearer(token)).json()
    return f"/sessions/{answer['session_id']}", answer["api_key"]


def refused(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert (answer.headers.get("www-authenticate") == "Bearer") == (status == 401)
    message: str = error["message"]
    return message


ALL = [
    ("POST", "/sessions"),
    ("GET", "{}"),
    ("PUT", "{}"),
    ("DELETE", "{}"),
    ("POST", "{}/samples"),
    ("POST", "{}/v1/chat/completions"),
    ("GET", "{}/v1/models"),
    ("GET", "{}/model_info"),
    ("GET", "{}/v1/anything"),
    ("GET", "/nothing"),
]


@pytest.mark.parametrize(("method", "path"), ALL)
def test_nothing_without_a_good_token(http: httpx.Client, engine: ScriptedEngine, method: str, path: str) -> None:
    session, key = start(http)
    other, _ = start(http)
    body = {"messages": [USER]} if method == "POST" else None
    for headers in (
        {},
        {"authorization": "Bearer"},
        bearer("wrong"),
        bearer(ADMIN[:-1]),
        {"authorization": f"Basic {ADMIN}"},
    ):
        refused(http.request(method, path.format(session), json=body, headers=headers), 401, "invalid_api_key")
    if "{}" in path:  # another session's key
        refused(http.request(method, path.format(other), json=body, headers=bearer(key)), 401, "invalid_api_key")
    assert engine.bodies == []
    assert http.get(session, headers=bearer(ADMIN)).json()["records"] == []


def test_health_is_open(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200


def test_what_an_agent_reaches_with_its_key(http: httpx.Client, guarded: Served) -> None:
    session, key = start(http)
    with openai.OpenAI(base_url=f"{guarded.url}{session}/v1", api_key=key, max_retries=0) as client:
        got = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
        assert got.choices[0].message.content == "ok"
        assert [model.id for model in client.models.list()] == ["tiny"]
    assert http.get(f"{session}/model_info", headers={"x-api-key": key}).status_code == 200
    for method, path in (("GET", session), ("DELETE", session), ("POST", f"{session}/samples")):
        text = refused(http.request(method, path, headers=bearer(key)), 403, "permission_denied")
        assert "needs an admin token" in text
    refused(http.post("/sessions", headers=bearer(key)), 401, "invalid_api_key")
    refused(http.put(session, headers=bearer(key)), 403, "permission_denied")
    assert len(http.get(session, headers=bearer(ADMIN)).json()["records"]) == 1


def test_every_admin_token_opens_everything_and_its_keys_are_good(http: httpx.Client) -> None:
    """So that one can be replaced by another: listed together for a while."""
    session, key = start(http, OTHER)
    keys = Keys([OTHER])
    mine = keys.issue(session.rpartition("/")[2])
    assert mine != key  # issued under the first
    for token in (key, mine, ADMIN, OTHER):
        answer = http.post(f"{session}/v1/chat/completions", json={"messages": [USER]}, headers=bearer(token))
        assert answer.status_code == 200, answer.text
    assert http.delete(session, headers=bearer(OTHER)).status_code == 204
    answer = http.post(f"{session}/v1/chat/completions", json={"messages": [USER]}, headers=bearer(key))
    refused(answer, 410, "session_deleted")


def test_what_a_key_does_not_reach_is_not_passed_on(http: httpx.Client) -> None:
    session, key = start(http)
    refused(http.post(f"{session}/v1/unheard_of", headers=bearer(key)), 403, "permission_denied")
    for path in ("tokenize", "metrics", "samples/", "../sessions"):
        assert http.get(f"{session}/{path}", headers=bearer(key)).status_code in (307, 401, 403)


@given(st.text(max_size=20), st.text(max_size=20))
def test_a_key_opens_its_own_session_only(one: str, other: str) -> None:
    keys = Keys([ADMIN, OTHER])
    assert keys.opens(keys.issue(one), one)
    assert keys.opens(Keys([OTHER]).issue(one), one)
    assert keys.opens(keys.issue(one), other) == (one == other)
    assert not keys.opens(Keys(["a-token-of-somebody-else"]).issue(one), one)
    assert not keys.admin(keys.issue(one))
    assert not keys.admin(one)


def test_keys_are_computed_as_documented() -> None:
    expected = hmac.digest(ADMIN.encode(), b"pacenote session\0mine", "sha256").hex()
    assert Keys([ADMIN, OTHER]).issue("mine") == f"pn-{expected}"


def test_where_tokens_come_from(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# comment\n\n  {ADMIN}  \n{OTHER}\n")
    assert read_tokens(file, {"PACENOTE_AUTH_TOKENS": "ignored"}) == (ADMIN, OTHER)
    assert read_tokens(None, {"PACENOTE_AUTH_TOKENS": f"{ADMIN}, {OTHER}"}) == (ADMIN, OTHER)
    assert read_tokens(None, {}) == ()
    with pytest.raises(ValueError, match=r"expected --auth-file .*/none as a file of tokens"):
        read_tokens(tmp_path / "none", {})


@pytest.mark.parametrize("tokens", [(), ("short",), (ADMIN, "with a space in the middle"), ("ünïcode-token-of-mine",)])
def test_tokens_that_cannot_be(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .*token"):
        SessionConfig(model="m", upstream="http://x", auth="tokens", tokens=tokens)


def test_tokens_are_not_printed_and_hosts_without_them_are_refused() -> None:
    assert ADMIN not in repr(SessionConfig(model="m", upstream="http://x", auth="tokens", tokens=(ADMIN,)))
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        SessionConfig(model="m", upstream="http://x", host=host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""):
        with pytest.raises(ValueError, match="auth off is for loopback hosts"):
            SessionConfig(model="m", upstream="http://x", host=host)
        SessionConfig(model="m", upstream="http://x", host=host, auth="tokens", tokens=(ADMIN,))
    with pytest.raises(ValueError, match="expected auth of off or tokens, got 'on'"):
        SessionConfig(model="m", upstream="http://x", auth="on")
