"""One chat over HTTP: what is asked, what is answered, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from numpy.typing import NDArray

from tests.rollout.talk import (
    CALLS,
    MORE,
    TOOL,
    USER,
    WAIT,
    Message,
    chat,
    error,
    events,
    records,
    said,
    samples,
    start,
)

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"messages": None}, "messages", "messages must be a non-empty list of messages, got NoneType"),
        ({"messages": []}, "messages", "got an empty list"),
        ({"messages": [{"role": "judge"}]}, "messages", "messages[0].role must be one of"),
        ({"n": 0}, "n", "n must be a number of choices in 1..128, got 0"),
        ({"n": 129}, "n", "in 1..128, got 129"),
        ({"n": True}, "n", "in 1..128, got True"),
        ({"n": 2.0}, "n", "in 1..128, got 2.0"),
        ({"stream": "yes"}, "stream", "stream must be true or false"),
        ({"stream_options": []}, "stream_options", "stream_options must be an object"),
        ({"tools": {}}, "tools", "tools must be a list, got dict"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0] must be an object with a function"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize cannot be set"),
        ({"chat_template_kwargs": {"clear_thinking": True}}, "chat_template_kwargs", "clear_thinking is False"),
        ({"response_format": json.loads("[" * 400 + "]" * 400)}, None, "at most 100 levels of lists and objects"),
    ],
)
def test_requests_that_cannot_be_served(
    http: httpx.Client, engine: ScriptedEngine, fields: dict[str, Any], param: str | None, text: str
) -> None:
    session = start(http)
    answer = http.post(f"{session}/v1/chat/completions", json={"messages": [USER], **fields})
    assert text in error(answer, 400, "bad_request")
    assert answer.json()["error"]["param"] == param
    assert engine.bodies == []
    assert records(http, session) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 90])
def test_bodies_that_are_no_object(http: httpx.Client, content: bytes) -> None:
    session = start(http)
    assert "the body" in error(http.post(f"{session}/v1/chat/completions", content=content), 400, "bad_request")
    if content:
        assert "the body" in error(http.post(f"{session}/samples", content=content), 400, "bad_request")
    answer = http.post(f"{session}/samples", json={"include_superseded": 1})
    assert "include_superseded must be true or false" in error(answer, 400, "bad_request")


def test_what_reaches_the_engine(http: httpx.Client, engine: ScriptedEngine) -> None:
    ours = {
        "model": "other",
        "logprobs": False,
        "input_ids": [1, 2],
        "return_routed_experts": False,
        "routed_experts_start_len": 5,
        "return_meta_info": False,
        "no_stop_trim": True,
        "stream": False,
        "n": 1,
        "user": "x",
        "return_hidden_states": True,
        "bootstrap_room": 3,
    }
    answer = chat(http, start(http), [USER], temperature=0.5, max_tokens=7, stop=["x"], seed=1, top_k=None, **ours)
    [body] = engine.bodies
    assert body == {
        "temperature": 0.5,
        "max_tokens": 7,
        "stop": ["x"],
        "seed": 1,
        "model": "tiny",
        "messages": [USER],
        "input_ids": answer.json()["prompt_token_ids"],
        "stream": False,
        "logprobs": True,
        "return_meta_info": True,
        "no_stop_trim": False,
        "return_routed_experts": True,
        "routed_experts_start_len": 0,
    }


def test_routes_stay_here(http: httpx.Client, engine: ScriptedEngine) -> None:
    """The client gets no replay payload, and the engine is asked only for rows that the session lacks."""
    session = start(http)
    for fields in ({}, {"stream": True}):
        answer = chat(http, session, [USER], **fields)
        assert "routed" not in answer.text
        assert "meta_info" not in answer.text
    message = said(http, session, [USER])
    said(http, session, [USER, message, MORE])
    held = len(engine.bodies[-2]["input_ids"]) + 2 - 1
    assert engine.bodies[-1]["routed_experts_start_len"] == held
    assert "routed" not in http.get(session).text


def test_rows_belong_to_their_tokens_through_all_layers_of_the_server(
    http: httpx.Client,
    engine: ScriptedEngine,
    answer: Make,
    identity: Callable[[NDArray[Any]], tuple[list[int], list[int]]],
) -> None:
    session = start(http)
    messages: list[Message] = [USER]
    script = iter([([50, 498], 498), ([51, 500], 500), ([52], None), ([53, 491], 491)])

    def write(body: dict[str, Any]) -> dict[str, Any]:
        ids, matched = next(script)
        return answer(body, ids, matched=matched)

    engine.write = write
    for after in (MORE, MORE, TOOL, None):  # kept, dropped, ended by length
        messages += [said(http, session, messages)] + ([after] if after else [])
    [trajectory] = samples(http, session)
    assert trajectory.experts is not None
    assert identity(trajectory.experts) == (trajectory.tokens[:-1].tolist(), list(range(len(trajectory) - 1)))
    assert trajectory.tokens[trajectory.loss_mask == 1].tolist() == [50, 498, 51, 52, 53, 491]
    assert trajectory.tokens.tolist()[-2:] == [53, 491]
    assert engine.bodies[0]["routed_experts_start_len"] == 0


def test_a_large_answer(http: httpx.Client, engine: ScriptedEngine, answer: Make) -> None:
    """Beyond the size that is read on the event loop."""
    engine.write = lambda body: answer(body, [40 + i % 400 for i in range(3000)])
    session = start(http)
    said(http, session, [USER])
    [trajectory] = samples(http, session)
    assert trajectory.trained == 3000


def test_roles_that_may_not_be_appended(serve: Callable[..., Served], engine: ScriptedEngine) -> None:
    with serve() as served, httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http:
        session = start(http)
        message = said(http, session, [{"role": "system", "content": "s"}, USER])
        history = [{"role": "system", "content": "s"}, USER, message]
        answer = chat(http, session, [*history, TOOL, MORE])
        text = error(answer, 400, "role_not_allowed")
        assert "messages[4] has role 'user', but only tool may be appended" in text
        assert "--tito-allowed-append-roles" in text
        assert answer.json()["error"]["param"] == "messages[4].role"
        assert len(engine.bodies) == len(records(http, session)) == 1
        said(http, session, [*history, TOOL])
        said(http, session, [USER, {"role": "assistant", "content": "other"}, MORE])  # a root may hold any role


@pytest.mark.parametrize("arguments", ['{"city": "Par', "[1]", "", '{"a": "\\ud800"}', '{"a":' * 600 + "1" + "}" * 600])
def test_malformed_tool_arguments_do_not_end_the_session(
    http: httpx.Client, engine: ScriptedEngine, answer: Make, arguments: str
) -> None:
    session = start(http)
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    engine.write = lambda body: answer(body, [40, 500], matched=500, message={"content": None, "tool_calls": calls})
    first = chat(http, session, [USER]).json()["choices"][0]
    assert first["finish_reason"] == "tool_calls"
    assert first["message"] == {"role": "assistant", "content": None, "reasoning_content": None, "tool_calls": calls}
    tool = {"role": "tool", "tool_call_id": "c", "content": "error: bad arguments"}
    said(http, session, [USER, first["message"], tool])
    assert engine.bodies[-1]["input_ids"][: len(engine.bodies[0]["input_ids"]) + 2] == [
        *engine.bodies[0]["input_ids"],
        40,
        500,
    ]
    assert [record["parent"] for record in records(http, session)] == [None, 0]


def test_a_stream(http: httpx.Client, engine: ScriptedEngine, answer: Make) -> None:
    engine.write = lambda body: answer(body, [40, 500], matched=500, message={"tool_calls": CALLS})
    session = start(http)
    chunk, usage = events(chat(http, session, [USER], stream=True, stream_options={"include_usage": True}))
    assert chunk["object"] == usage["object"] == "chat.completion.chunk"
    assert chunk["id"] == usage["id"] == records(http, session)[0]["id"]
    assert chunk["usage"] is None
    [choice] = chunk["choices"]
    assert choice["delta"]["tool_calls"] == [CALLS[0] | {"index": 0}]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["token_ids"] == [40, 500]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2
    [chunk] = events(chat(http, session, [USER], stream=True))
    assert "usage" not in chunk
    assert engine.bodies[-1]["stream"] is False
