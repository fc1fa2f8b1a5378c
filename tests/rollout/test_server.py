"""The session server over HTTP: agents' clients in front, a scripted engine or the embedded one behind."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from starlette.responses import JSONResponse, Response

from pacenote.rollout.errors import StartupError
from pacenote.rollout.launch import Service, engine_command, free_port, sessions_command
from pacenote.rollout.messages import ROLES
from pacenote.rollout.samples import decode_samples
from pacenote.rollout.server import SessionConfig, create_app, load_geometry, serve_command
from pacenote.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

Message = dict[str, Any]
Make = Callable[..., dict[str, Any]]
WAIT = 30  # seconds after which something that should come is taken not to come
USER = {"role": "user", "content": "a"}
MORE = {"role": "user", "content": "b"}
TOOL = {"role": "tool", "content": "b"}
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]


@pytest.fixture(scope="module")
def served(serve: Callable[..., Served]) -> Iterator[Served]:
    """A session server that allows every role."""
    with serve(append_roles=frozenset(ROLES), served_model="tiny") as served:
        yield served


@pytest.fixture
def http(served: Served, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    """A client of it; the engine is as new."""
    with httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that wait."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


def start(http: httpx.Client) -> str:
    answer = http.post("/sessions")
    assert answer.status_code == 200
    session: str = answer.json()["session_id"]
    return f"/sessions/{session}"


def chat(http: httpx.Client, session: str, messages: object, **fields: Any) -> httpx.Response:
    return http.post(f"{session}/v1/chat/completions", json={"messages": messages, **fields})


def said(http: httpx.Client, session: str, messages: list[Any], **fields: Any) -> Message:
    """The message of an answer that must come."""
    answer = chat(http, session, messages, **fields)
    assert answer.status_code == 200, answer.text
    message: Message = answer.json()["choices"][0]["message"]
    return message


def records(http: httpx.Client, session: str) -> list[dict[str, Any]]:
    answer = http.get(session)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["records"]
    return found


def samples(http: httpx.Client, session: str, **options: Any) -> list[Trajectory]:
    answer = http.post(f"{session}/samples", json=options)
    assert answer.status_code == 200, answer.text
    return decode_samples(answer.content)


def error(answer: httpx.Response, status: int, code: str) -> str:
    """The message of an error body in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == code
    message: str = body["message"]
    return message


def test_a_session_from_start_to_end(http: httpx.Client) -> None:
    session = start(http)
    assert http.get(session).json() == {
        "session_id": session.rpartition("/")[2],
        "records": [],
        "metadata": {
            "accumulated_token_ids": [],
            "created": http.get(session).json()["metadata"]["created"],
            "recovered": False,
            "in_flight": 0,
        },
    }
    assert samples(http, session) == []
    answer = chat(http, session, [USER], model="mine").json()
    choice = answer["choices"][0]
    prompt = answer["prompt_token_ids"]
    assert (answer["object"], answer["model"]) == ("chat.completion", "mine")
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 2,
        "total_tokens": len(prompt) + 2,
    }
    assert choice["message"] == {"role": "assistant", "content": "ok", "reasoning_content": None}
    assert (choice["token_ids"], choice["prompt_token_ids"], choice["finish_reason"]) == ([40, 41], prompt, "length")
    body = http.get(session).json()
    assert body["metadata"]["accumulated_token_ids"] == [*prompt, 40, 41]
    assert [record["id"] for record in body["records"]] == [answer["id"]]
    [trajectory] = samples(http, session)
    assert trajectory.tokens.tolist() == [*prompt, 40, 41]
    gone = http.delete(session)
    assert (gone.status_code, gone.content) == (204, b"")
    for use in (http.get(session), chat(http, session, [USER]), http.post(f"{session}/samples")):
        assert "was deleted: start another with POST /sessions" in error(use, 410, "session_deleted")
    assert http.delete(session).status_code == 204


def test_an_unknown_id(http: httpx.Client) -> None:
    session = "/sessions/never-started"
    assert http.get(session).json() == {
        "session_id": "never-started",
        "records": [],
        "metadata": {"accumulated_token_ids": []},
    }
    error(http.post(f"{session}/samples"), 404, "session_not_found")  # looking has created nothing
    said(http, session, [USER])  # a chat starts it
    assert http.get(session).json()["metadata"]["recovered"] is True
    assert len(samples(http, session)) == 1
    assert "at most 256 characters" in error(chat(http, "/sessions/" + "x" * 257, [USER]), 400, "bad_request")


def test_health_and_models(http: httpx.Client) -> None:
    health = http.get("/health").json()
    assert health["status"] == "ok"
    assert health == http.get("/health").json()  # the instance id stays
    models = http.get(f"{start(http)}/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_paths_that_are_not_served(http: httpx.Client) -> None:
    error(http.get("/nothing"), 404, "not_found")
    error(http.get("/sessions"), 405, "method_not_allowed")
    error(http.get(f"{start(http)}/v1/chat/completions"), 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"messages": None}, "messages", "messages must be a non-empty list of messages, got NoneType"),
        ({"messages": []}, "messages", "got an empty list"),
        ({"messages": [{"role": "judge"}]}, "messages", "messages[0].role must be one of"),
        ({"n": 2}, "n", "n must be 1, got 2: send the request again for another answer"),
        ({"n": 0}, "n", "n must be 1, got 0"),
        ({"stream": "yes"}, "stream", "stream must be true or false"),
        ({"stream_options": []}, "stream_options", "stream_options must be an object"),
        ({"tools": {}}, "tools", "tools must be a list, got dict"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0] must be an object with a function"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize cannot be set"),
        ({"chat_template_kwargs": {"clear_thinking": True}}, "chat_template_kwargs", "clear_thinking is False"),
        ({"response_format": json.loads("[" * 400 + "]" * 400)}, None, "cannot be passed on to the engine"),
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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 5000])
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


def test_two_chats_at_once_are_both_kept(http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor) -> None:
    session = start(http)
    engine.hold()
    both = [pool.submit(chat, http, session, [USER]) for _ in range(2)]
    other = pool.submit(chat, http, session, [MORE])
    for _ in range(3):
        assert engine.arrived.acquire(timeout=WAIT)
    assert http.get(session).json()["metadata"]["in_flight"] == 3  # and nothing waits for them
    assert records(http, session) == []
    engine.release()
    assert [future.result(WAIT).status_code for future in (*both, other)] == [200] * 3
    assert [record["status"] for record in records(http, session)] == ["completed"] * 3
    assert len(samples(http, session)) == 3
    said(http, session, [USER])  # asked again, later: another sample, and the two are not trained any more
    assert [t.status for t in samples(http, session, include_superseded=True)].count("superseded") == 2
    assert len(samples(http, session)) == 2
    assert http.get(session).json()["metadata"]["in_flight"] == 0


def test_delete_does_not_wait_and_aborts(http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor) -> None:
    session = start(http)
    engine.hold()
    waiting = pool.submit(chat, http, session, [USER])
    assert engine.arrived.acquire(timeout=WAIT)
    assert http.delete(session).status_code == 204  # the engine is still held
    assert engine.aborted.acquire(timeout=WAIT)
    assert "was deleted while it generated" in error(waiting.result(WAIT), 410, "session_deleted")
    engine.release()
    error(chat(http, session, [USER]), 410, "session_deleted")
    error(http.get(session), 410, "session_deleted")


def test_a_client_that_leaves_aborts_and_its_retry_is_no_rival(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    engine.hold()
    body = json.dumps({"messages": [USER]}).encode()
    head = f"POST {session}/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as client:
        client.sendall(head.encode() + body)
        assert engine.arrived.acquire(timeout=WAIT)
    assert engine.aborted.acquire(timeout=WAIT)
    engine.release()
    said(http, session, [USER])
    assert [record["status"] for record in records(http, session)] == ["completed"]


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


def events(answer: httpx.Response) -> list[Any]:
    """The data of well-formed server-sent events; the last is [DONE]."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, rest = answer.text.split("\n\n")
    assert rest == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


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


def test_openai_sync(http: httpx.Client, served: Served, engine: ScriptedEngine, answer: Make) -> None:
    engine.write = lambda body: answer(body, [40, 500], matched=500, message={"content": "t", "tool_calls": CALLS})
    session = start(http)
    with openai.OpenAI(base_url=f"{served.url}{session}/v1", api_key="x", max_retries=0) as client:
        got = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "a"}])
        assert got.choices[0].message.content == "t"
        assert got.choices[0].message.tool_calls is not None
        assert got.choices[0].message.tool_calls[0].id == "c"
        assert got.choices[0].finish_reason == "tool_calls"
        assert got.choices[0].logprobs is not None
        assert got.choices[0].logprobs.content is not None
        assert len(got.choices[0].logprobs.content) == 2
        assert got.usage is not None
        assert got.usage.completion_tokens == 2
        history: list[Any] = [{"role": "user", "content": "a"}, got.choices[0].message.model_dump()]
        history.append({"role": "tool", "content": "r", "tool_call_id": "c"})
        client.chat.completions.create(model="policy", messages=history)
        assert [record["parent"] for record in records(http, session)] == [None, 0]
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "a"}], n=2)
        assert (refused.value.code, refused.value.param) == ("bad_request", "n")
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_stream(http: httpx.Client, served: Served, engine: ScriptedEngine, answer: Make) -> None:
    engine.write = lambda body: answer(body, [40, 491], matched=491)
    client = openai.OpenAI(base_url=f"{served.url}{start(http)}/v1", api_key="x", max_retries=0)
    asked: list[Any] = [USER]
    usage: Any = {"include_usage": True}
    with client, client.chat.completions.stream(model="m", messages=asked, stream_options=usage) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "ok"
    assert final.usage is not None
    assert final.usage.completion_tokens == 2


def test_openai_async(http: httpx.Client, served: Served) -> None:
    session = start(http)

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}{session}/v1", api_key="x", max_retries=0) as client:
            asked = [
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": str(number)}])
                for number in range(8)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == ["ok"] * 8
    assert sorted(record["messages"][0]["content"] for record in records(http, session)) == list("01234567")


def test_overflow_is_what_agents_look_for(http: httpx.Client, served: Served, engine: ScriptedEngine) -> None:
    text = {"message": "Requested token count exceeds the model's maximum context length of 8 tokens."}
    engine.write = lambda _: JSONResponse(text, 400)
    client = openai.OpenAI(base_url=f"{served.url}{start(http)}/v1", api_key="x", max_retries=0)
    with client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
    assert (caught.value.status_code, caught.value.code) == (400, "context_length_exceeded")


def test_everybody_else_is_served_while_one_generates(
    http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    engine.hold()
    held: list[Future[httpx.Response]] = [pool.submit(chat, http, start(http), [USER]) for _ in range(3)]
    for _ in held:
        assert engine.arrived.acquire(timeout=WAIT)
    assert http.get("/health").status_code == 200
    assert http.delete(start(http)).status_code == 204
    engine.release()
    assert {future.result(WAIT).status_code for future in held} == {200}


# With real processes: the embedded engine, the session server, the SDK.


@pytest.fixture(scope="module")
def road(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a session server process in front of an engine process with a short context."""
    logs = tmp_path_factory.mktemp("road")
    engine_port, port = free_port(), free_port()
    behind, url = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{port}"
    command = engine_command(tiny_dir, port=engine_port, context_length=160, served_model_name="tiny", dtype="float32")
    front = sessions_command(
        tiny_dir, upstream=behind, port=port, extra=["--served-model", "tiny", "--tito-allowed-append-roles", *ROLES]
    )
    with (
        Service("engine", command, url=behind, log=logs / "engine.log") as engine,
        Service("sessions", front, url=url, log=logs / "sessions.log") as sessions,
    ):
        sessions.wait_healthy(120)
        engine.wait_healthy(120)
        yield url
        assert sessions.alive, sessions.tail()
    assert "Traceback" not in (logs / "sessions.log").read_text()


def test_the_whole_road(road: str, tiny_dir: Path) -> None:
    with httpx.Client(base_url=road, timeout=WAIT, trust_env=False) as http:
        session = start(http)
        client = openai.OpenAI(base_url=f"{road}{session}/v1", api_key="x", max_retries=0)
        history: list[Any] = [{"role": "user", "content": "hello"}]
        sent = []
        for number, role in enumerate(("tool", "user", "assistant")):
            got = client.chat.completions.create(
                model="m", messages=history, max_tokens=4, seed=number, temperature=1.0, extra_body={"top_p": 0.9}
            )
            extra: Any = got.choices[0].model_dump()
            sent.append(extra["prompt_token_ids"] + extra["token_ids"])
            history += [got.choices[0].message.model_dump(), {"role": role, "content": f"{role} {number}"}]
        [trajectory] = samples(http, session)
        assert trajectory.tokens.tolist() == sent[-1]
        assert trajectory.experts is not None
        assert trajectory.experts.shape == (len(trajectory) - 1, 5, 2)
        assert load_geometry(str(tiny_dir)).layers == trajectory.layers == (1, 2, 3, 4, 5)
        assert (trajectory.logprobs[trajectory.loss_mask == 1] < 0).all()
        assert not trajectory.logprobs[trajectory.loss_mask == 0].any()
        assert [r["parent"] for r in records(http, session)] == [None, 0, 1]
        # The same tokens in one go route as they did turn by turn.
        fresh = start(http)
        whole = [{"role": "user", "content": "hello"}]
        said(http, fresh, whole, max_tokens=1, seed=5)
        [first] = samples(http, fresh)
        prompt = len(first) - 1
        assert first.experts is not None
        np.testing.assert_array_equal(np.sort(first.experts[:prompt]), np.sort(trajectory.experts[:prompt]))
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x " * 200}])
        assert caught.value.code == "context_length_exceeded"
        client.close()


def test_leaving_frees_the_engine(road: str) -> None:
    """The answer that nobody waited for is aborted in the engine and not recorded."""
    with httpx.Client(base_url=road, timeout=WAIT, trust_env=False) as http:
        session = start(http)
        body = json.dumps({"messages": [USER], "max_tokens": 140, "ignore_eos": True}).encode()
        head = f"POST {session}/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as client:
            client.sendall(head.encode() + body)
        said(http, session, [USER], max_tokens=1)
        assert [record["completion_tokens"] for record in records(http, session)] == [1]


# The command line.


def one_sentence(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_port_in_use(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve_command(["--model", str(tiny_dir), "--upstream", "http://x", "--port", str(port)]) == 2
    said_ = one_sentence(capsys.readouterr().err)
    assert said_ == f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "/no/such"], "expected a model directory, got /no/such: no such directory"),
        (["--upstream", "localhost:3"], "expected upstream as an http:// or https:// URL, got 'localhost:3'"),
        (["--timeout", "0"], "expected a timeout above 0 seconds, got 0"),
        (["--timeout", "nan"], "expected a timeout above 0 seconds, got nan"),
        (["--port", "70000"], "expected a port in 0..65535, got 70000"),
        (["--host", "0.0.0.0"], "auth off is for loopback hosts, got host 0.0.0.0"),
    ],
)
def test_options_that_cannot_be(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    usual = ["--model", str(tiny_dir), "--upstream", "http://127.0.0.1:1", "--port", "0"]
    assert serve_command([*usual, *options]) == 2
    assert text in one_sentence(capsys.readouterr().err)


def test_flags_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_command(["--upstream", "http://x"]) == 2
    assert "--model" in capsys.readouterr().err
    assert serve_command(["--help"]) == 0
    assert "--tito-allowed-append-roles" in capsys.readouterr().out


def test_models_whose_routing_is_not_known(tiny_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny_dir / name).read_bytes())
    for text in (None, "{", '{"model_type": "gpt2"}'):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(StartupError, match="--no-routing-replay") as caught:
            load_geometry(str(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="append roles of system, user, assistant, tool, got judge"):
        SessionConfig(model="m", upstream="http://x", append_roles=frozenset({"judge"}))
    create_app(SessionConfig(model=str(tmp_path), upstream="http://x", routing_replay=False))


def test_the_process_says_where_it_is_and_ends_on_a_signal(tiny_dir: Path) -> None:
    command = [sys.executable, "-m", "pacenote.rollout.server", "--model", str(tiny_dir), "--upstream", "http://x:1"]
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            assert words[:2] == ["sessions", "on"]
            with httpx.Client(base_url=words[2].rstrip(","), timeout=WAIT, trust_env=False) as http:
                assert http.get("/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=WAIT)
            assert (process.returncode, out, err) == (0, "", "")
        finally:
            process.kill()
