"""Bounds on one request, in every dialect: what is over one is refused, asks no engine and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pacenote.rollout.request_limits import RequestLimits
from pacenote.rollout.serve_cli import serve_command
from tests.rollout.talk import USER, WAIT, error, start

if TYPE_CHECKING:
    from pathlib import Path

    from tests.rollout.conftest import ScriptedEngine, Served

CHAT, MESSAGES, COUNT, RESPONSES = "chat/completions", "messages", "messages/count_tokens", "responses"
DIALECTS = (CHAT, MESSAGES, RESPONSES)


@pytest.fixture(scope="module")
def limited(serve: Callable[..., Served]) -> Iterator[Served]:
    """A session server of narrow bounds."""
    with serve(limits=RequestLimits(depth=8, messages=3, prompt_tokens=60, new_tokens=9)) as served:
        yield served


@pytest.fixture
def http(limited: Served, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    """A client of it; the engine is as new."""
    with httpx.Client(base_url=limited.url, timeout=WAIT, trust_env=False) as client:
        yield client


def body(dialect: str, *messages: dict[str, Any], tokens: Any = 9, **fields: Any) -> dict[str, Any]:
    """The same question in each dialect."""
    asked = [*messages] or [USER]
    if dialect == RESPONSES:
        return {"input": asked, **({} if tokens is None else {"max_output_tokens": tokens}), **fields}
    return {"messages": asked, **({} if tokens is None else {"max_tokens": tokens}), **fields}


def message(answer: httpx.Response, dialect: str, code: str = "bad_request") -> str:
    """The text of a refusal."""
    if dialect == MESSAGES:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
        text: str = answer.json()["error"]["message"]
        return text
    return error(answer, 400, code)


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_bound_in_each_dialect(http: httpx.Client, engine: ScriptedEngine, dialect: str) -> None:
    session = start(http)
    before = http.get(session).json()

    def ask(*messages: dict[str, Any], **fields: Any) -> httpx.Response:
        return http.post(f"{session}/v1/{dialect}", json=body(dialect, *messages, **fields))

    text = message(ask(metadata=deep(8)), dialect)
    assert "at most 8 levels of lists and objects (--max-depth), got more: send what is nested" in text
    text = message(ask(USER, USER, USER, USER), dialect)
    assert "at most 3 messages (--max-messages), got 4: start another history" in text
    text = message(ask({"role": "user", "content": "word " * 60}), dialect, "context_length_exceeded")
    assert "tokens) is longer than --max-prompt-tokens (60 tokens)" in text
    assert "maximum context length is less" in text
    assert "context_length_exceeded" in text
    assert text.startswith("prompt is too long: ") == (dialect == MESSAGES)
    assert "in 1..9 (--max-new-tokens), got 10: ask for less, or leave it out" in message(ask(tokens=10), dialect)
    assert engine.bodies == []
    assert http.get(session).json() == before
    assert ask(USER, USER, USER, metadata=deep(7)).status_code == 200
    assert engine.bodies[-1]["max_tokens"] == 9


def test_what_can_be_counted_may_be_too_long_to_be_answered(http: httpx.Client) -> None:
    session = start(http)
    count = http.post(f"{session}/v1/{COUNT}", json=body(COUNT, {"role": "user", "content": "word " * 60}, tokens=None))
    assert count.json()["input_tokens"] > 60
    assert "--max-messages" in message(http.post(f"{session}/v1/{COUNT}", json=body(COUNT, *[USER] * 4)), MESSAGES)


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({}, {"max_tokens": 9}),
        ({"max_tokens": None, "max_completion_tokens": None}, {"max_tokens": 9}),
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3}, {"max_completion_tokens": 3}),
        ({"max_tokens": 2, "max_completion_tokens": 9}, {"max_tokens": 2, "max_completion_tokens": 9}),
    ],
)
def test_an_answers_budget(
    http: httpx.Client, engine: ScriptedEngine, fields: dict[str, Any], sent: dict[str, Any]
) -> None:
    assert http.post(f"{start(http)}/v1/{CHAT}", json=body(CHAT, tokens=None, **fields)).status_code == 200
    assert {name: value for name, value in engine.bodies[-1].items() if name.startswith("max_")} == sent


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [10, 10**30, "9", 9.0, True, 0, -1, [9], {"a": 1}])
def test_budgets_that_engines_would_read_otherwise(
    http: httpx.Client, engine: ScriptedEngine, name: str, value: Any
) -> None:
    asked = json.dumps(body(CHAT, tokens=None, **{name: value})).encode()
    answer = http.post(f"{start(http)}/v1/{CHAT}", content=asked)
    assert f"expected {name} as a whole number in 1..9" in error(answer, 400, "bad_request")
    assert engine.bodies == []


def test_without_bounds_the_engine_decides(serve: Callable[..., Served], engine: ScriptedEngine) -> None:
    with serve() as served, httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http:
        session = f"{start(http)}/v1"
        for fields in ({}, {"max_tokens": 10**6}, {"max_tokens": "9"}):
            assert http.post(f"{session}/{CHAT}", json=body(CHAT, tokens=None, **fields)).status_code == 200
            assert engine.bodies[-1].get("max_tokens") == fields.get("max_tokens")
        refused = http.post(f"{session}/{CHAT}", json=body(CHAT, metadata=deep(100)))
        assert "at most 100 levels" in error(refused, 400, "bad_request")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-be", "utf-8-sig"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_encoding_that_hides_brackets(http: httpx.Client, dialect: str, encoding: str) -> None:
    """Python's parser takes UTF-16, whose quotes and backslashes stand elsewhere."""
    raw = json.dumps(body(dialect, metadata=deep(60))).encode(encoding)
    assert message(http.post(f"{start(http)}/v1/{dialect}", content=raw), dialect)


def test_what_is_passed_on(http: httpx.Client) -> None:
    answer = http.post(f"{start(http)}/v1/tokenize", json={"prompt": deep(8)})
    assert "at most 8 levels" in error(answer, 400, "bad_request")
    assert http.post(f"{start(http)}/v1/tokenize", json={"prompt": deep(7)}).status_code == 404  # the engine's own


@pytest.mark.parametrize("name", ["max_depth", "max_messages", "max_prompt_tokens", "max_new_tokens"])
def test_bounds_that_cannot_be(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"expected {name.replace('_', ' ')} of at least 1, got 0"
    with pytest.raises(ValueError, match=text):
        RequestLimits(**{name.removeprefix("max_"): 0})
    flag = f"--{name.replace('_', '-')}"
    assert serve_command(["--model", str(tmp_path), "--upstream", "http://x", flag, "0"]) == 2
    assert capsys.readouterr().err == f"error: {text}\n"
