"""Engines that fail: nothing of it is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.responses import Response

from pacenote.rollout.launch import free_port
from tests.rollout.talk import USER, WAIT, chat, error, records, said, samples, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

Make = Callable[..., dict[str, Any]]


def broken(answer: Make, **meta: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda body: answer(body, [40, 41], **meta)


@pytest.mark.parametrize(
    ("status", "raw", "code"),
    [
        (200, b"<html>", (502, "upstream_error")),
        (200, b'{"choices": []}', (502, "upstream_error")),
        (500, b"boom", (502, "upstream_error")),
        (429, b"{}", (502, "upstream_error")),
        (400, b'{"message": "bad temperature"}', (400, "bad_request")),
        (400, b'{"message": "longer than the model\'s context length"}', (400, "context_length_exceeded")),
    ],
)
def test_an_engine_that_fails(
    http: httpx.Client, engine: ScriptedEngine, status: int, raw: bytes, code: tuple[int, str]
) -> None:
    session = start(http)
    said(http, session, [USER])
    engine.write = lambda _: Response(raw, status)
    for fields in ({}, {"stream": True}):
        error(chat(http, session, [USER], **fields), *code)
    assert [record["status"] for record in records(http, session)] == ["completed"]  # nothing was superseded
    engine.write = None
    said(http, session, [USER])
    assert [record["status"] for record in records(http, session)] == ["superseded", "completed"]


def test_answers_that_are_not_committed(http: httpx.Client, engine: ScriptedEngine, answer: Make) -> None:
    session = start(http)
    spoilt: list[dict[str, Any]] = [
        {"finish_reason": {"type": "abort", "message": "x"}},
        {"completion_tokens": None},
        {"prompt_tokens": 1},
        {"output_token_logprobs": [[-1.0, 40, None]]},
        {"routed_experts": ""},
    ]
    for meta in spoilt:
        engine.write = broken(answer, **meta)
        error(chat(http, session, [USER]), 502, "upstream_error")

    def nan(body: dict[str, Any]) -> Response:
        raw = answer(body, [40, 41])
        raw["choices"][0]["meta_info"]["output_token_logprobs"][0][0] = float("nan")
        return Response(json.dumps(raw), media_type="application/json")

    engine.write = nan
    error(chat(http, session, [USER]), 502, "upstream_error")
    assert records(http, session) == []
    assert samples(http, session) == []


def test_an_engine_that_is_not_there_or_too_slow(serve: Callable[..., Served], engine: ScriptedEngine) -> None:
    with (
        serve(upstream=f"http://127.0.0.1:{free_port()}") as served,
        httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http,
    ):
        assert "no answer from the engine" in error(chat(http, start(http), [USER]), 502, "upstream_error")
    engine.hold()
    with serve(timeout=0.05) as served, httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http:
        session = start(http)
        assert "within 0.05 s" in error(chat(http, session, [USER]), 504, "upstream_timeout")
        assert engine.aborted.acquire(timeout=WAIT)
        assert records(http, session) == []
