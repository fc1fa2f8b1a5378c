"""Any request and any engine: never a 500, and what is refused or cannot be trained on changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.responses import Response

from pacenote.rollout.messages import ROLES
from tests.rollout.talk import USER, WAIT, chat, records, said, samples, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

Make = Callable[..., dict[str, Any]]
RELAXED = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
TEXT = st.text(max_size=6) | st.sampled_from(["<|user|>", "<think>", "[gMASK]", "\u0000", "\U0001d54f", "{{ 1/0 }}"])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
CALL = st.fixed_dictionaries(
    {},
    optional={
        "id": SCALAR,
        "type": SCALAR,
        "function": JSON | st.fixed_dictionaries({"name": TEXT, "arguments": JSON}),
    },
)
MESSAGE = JSON | st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | SCALAR},
    optional={
        "content": TEXT | JSON | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": SCALAR}), max_size=2),
        "reasoning_content": SCALAR,
        "tool_calls": st.lists(CALL, max_size=2) | JSON,
        "tool_call_id": SCALAR,
        "name": SCALAR,
    },
)
FUNCTION = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT}) | JSON}
)
BODY = JSON | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | st.just([USER]) | JSON},
    optional={
        "tools": st.lists(FUNCTION | JSON, max_size=2) | JSON,
        "n": st.integers(-1, 3) | SCALAR,
        "stream": st.booleans() | SCALAR,
        "stream_options": JSON,
        "model": SCALAR,
        "seed": st.integers() | SCALAR,
        "chat_template_kwargs": st.dictionaries(
            st.sampled_from(["enable_thinking", "tools", "messages", "loop", "add_generation_prompt", "x"]) | TEXT, JSON
        )
        | JSON,
        "reasoning_effort": JSON,
        "temperature": JSON,
        "max_tokens": JSON,
        "logprobs": JSON,
        "input_ids": JSON,
    },
)


@pytest.fixture(scope="module", params=["tree", "linear"])
def client(request: pytest.FixtureRequest, serve: Callable[..., Served]) -> Iterator[tuple[httpx.Client, Served]]:
    """A client of a server under either policy, and the server."""
    with (
        serve(policy=request.param, append_roles=frozenset(ROLES)) as served,
        httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http,
    ):
        yield http, served


@RELAXED
@given(
    body=BODY,
    extend=st.booleans(),
    key=st.none() | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=3),
)
@example(body={"messages": [USER], "chat_template_kwargs": {"x": [[[]]]}}, extend=True, key=None)
@example(body={"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, extend=True, key="k")
def test_any_request(
    client: tuple[httpx.Client, Served], engine: ScriptedEngine, body: Any, extend: bool, key: str | None
) -> None:
    http, served = client
    session = start(http)
    history = [USER, said(http, session, [USER])]
    if extend and isinstance(body, dict) and isinstance(body.get("messages"), list):
        body = body | {"messages": history + body["messages"]}
    before, asked = http.get(session).json(), len(engine.bodies)
    try:
        content = orjson.dumps(body)
    except TypeError:  # an integer beyond 64 bits
        content = json.dumps(body).encode()
    headers = {} if key is None else {"Idempotency-Key": key}
    answer = http.post(f"{session}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code in (200, 400, 422), answer.text
    assert 500 not in served.statuses
    after = http.get(session)
    assert after.status_code == 200
    if answer.status_code == 200:
        assert len(after.json()["records"]) == 1 + len(engine.bodies) - asked
    else:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert after.json() == before
        assert len(engine.bodies) == asked
    assert samples(http, session)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for name, item in inner for found in places(item, (*path, name))]


ENGINES = JSON | st.sampled_from([float("nan"), float("inf"), 10**30, -1, [[]], {"type": "stop"}, "x" * 100])


@RELAXED
@given(data=st.data(), times=st.integers(1, 2))
def test_any_engine(
    client: tuple[httpx.Client, Served], engine: ScriptedEngine, answer: Make, data: st.DataObject, times: int
) -> None:
    """A part of a sound answer is taken out or replaced; it is recorded whole, or not at all."""
    http, served = client
    session = start(http)
    engine.write = None
    first = said(http, session, [USER])
    before = http.get(session).json()

    def write(body: dict[str, Any]) -> Response:
        made = copy.deepcopy(answer(body, [40, 41], matched=41))
        for _ in range(times):
            *path, last = data.draw(st.sampled_from(places(made)))
            holder: Any = made
            for name in path:
                holder = holder[name]
            if data.draw(st.booleans()):
                holder[last] = data.draw(ENGINES)
            else:
                del holder[last]
        return Response(json.dumps(made), media_type="application/json")

    engine.write = write
    got = chat(http, session, [USER, first, USER])
    engine.write = None
    assert got.status_code in (200, 502), got.text
    assert 500 not in served.statuses
    if got.status_code == 200:
        assert len(records(http, session)) == 2
    else:
        assert http.get(session).json() == before
    [trajectory] = samples(http, session)
    assert trajectory.trained in (2, 4)


@pytest.mark.parametrize("levels", [120, 260, 1000])
def test_an_engines_message_that_cannot_be_written(
    client: tuple[httpx.Client, Served], engine: ScriptedEngine, answer: Make, levels: int
) -> None:
    """What cannot be passed on to the client is not recorded either, so the session can be read afterwards."""
    http, served = client
    session = start(http)
    nested = '{"a":' * levels + "1" + "}" * levels
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "HERE"}}]
    engine.write = lambda body: Response(
        json.dumps(answer(body, [40], message={"content": "x", "tool_calls": calls})).replace('"HERE"', nested)
    )
    got = chat(http, session, [USER])
    assert got.status_code in (200, 502)
    assert 500 not in served.statuses
    assert len(records(http, session)) == (got.status_code == 200)
