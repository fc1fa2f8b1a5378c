"""Tools by an answer's calls, and agents of somebody's in front of the real servers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.rollout.launch import Service, engine_command, free_port, sessions_command
from pacenote.rollout.messages import ROLES
from pacenote.rollout.samples import decode_samples
from pacenote.trainer.environments.agent import AgentLoop, run_tests, verdict
from pacenote.trainer.environments.tools import ToolLoop, describe, load_tools
from pacenote.trainer.tasks import Chat, Message, Task

TOOLBOX = "tests.trainer.toolbox"
ASK = Task(messages=[{"role": "user", "content": "letters"}], toolbox=TOOLBOX)
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


def call(name: Any, arguments: Any, number: int = 0) -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def play(loop: ToolLoop, *answers: list[Any]) -> list[Message]:
    """What the loop makes of a server whose answers hold these calls."""
    left = list(answers)

    def serve(request: httpx.Request) -> httpx.Response:
        assert {tool["function"]["name"] for tool in json.loads(request.content)["tools"]} == set(load_tools(TOOLBOX))
        message = {"role": "assistant", "content": "", "tool_calls": left.pop(0)}
        return httpx.Response(200, json={"choices": [{"message": message}]})

    async def main() -> list[Message]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(serve)) as client:
            return await loop(Chat(client, "http://x/v1"), ASK)

    return asyncio.run(main())


def test_tools_answer_side_by_side_and_in_order() -> None:
    calls = [call("meet", '{"name": "a"}', 1), call("add", '{"a": 2}', 2), call("meet", '{"name": "b"}', 3)]
    said = play(ToolLoop(), calls, [])
    assert [(m["tool_call_id"], m["content"]) for m in said if m["role"] == "tool"] == [
        ("c1", "a"), ("c2", "3"), ("c3", "b")
    ]  # fmt: skip
    assert said[-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("broken", "says"),
    [(call("nope", "{}"), "there is no tool 'nope'"), (call("add", "{"), "not JSON"), (call("add", "[1]"), "object"),
     (call("add", '{"c": 1}'), "do not fit"), (call("fail", "{}"), "KeyError: 'k'"), (call("slow", "{}"), "not done"),
     (None, "there is no tool None"), ({"function": None}, "there is no tool None"), (call([], "{}"), "error")],
)  # fmt: skip
def test_what_is_wrong_comes_back(broken: Any, says: str) -> None:
    [*_, told, last] = play(ToolLoop(seconds=0.1), [broken], [])
    assert told["role"] == "tool"
    assert told["content"].startswith("error")
    assert says in told["content"]
    assert last["role"] == "assistant"


@given(calls=st.lists(JSON | st.builds(call, JSON, JSON), max_size=3))
def test_no_call_raises(calls: list[Any]) -> None:
    said = play(ToolLoop(turns=1), calls)
    assert [m["role"] for m in said] == ["user", "assistant", *["tool"] * len(calls)]


def test_turns_and_results_are_bounded() -> None:
    said = play(ToolLoop(turns=2, longest=1), [call("add", '{"a": 99}')], [call("add", '{"a": 1}')])
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "assistant", "tool"]
    assert said[2]["content"] == "1... (2 more characters)"


def test_descriptions() -> None:
    made = describe("add", load_tools(TOOLBOX)["add"])["function"]
    assert made["parameters"]["properties"] == {"a": {"type": "integer"}, "b": {"type": "integer"}}
    assert (made["parameters"]["required"], made["description"]) == (["a"], "Sum.")
    for module, says in ((None, "expects a toolbox"), ("no.such", "cannot be imported"), ("json", "TOOLS")):
        with pytest.raises(ValueError, match=says):
            load_tools(module)


AGENT = """
import json, openai, os, subprocess, sys
task = json.load(open("task.json"))
client, messages, sampling = openai.OpenAI(), task["messages"], task["sampling"]
for turn in range(2):
    got = client.chat.completions.create(model="policy", messages=messages, **sampling)
    messages += [got.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "again"}]
open("out.txt", "w").write("done")
subprocess.Popen(["sleep", sys.argv[1]], start_new_session=True)
"""


@pytest.fixture(scope="module")
def road(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a session server in front of an embedded engine."""
    logs = tmp_path_factory.mktemp("road")
    engine_port, port = free_port(), free_port()
    behind, url = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{port}"
    command = engine_command(tiny_dir, port=engine_port, context_length=400, dtype="float32")
    front = sessions_command(tiny_dir, upstream=behind, port=port, extra=["--tito-allowed-append-roles", *ROLES])
    with (
        Service("engine", command, url=behind, log=logs / "engine.log") as engine,
        Service("sessions", front, url=url, log=logs / "sessions.log") as sessions,
    ):
        sessions.wait_healthy(120)
        engine.wait_healthy(120)
        yield url


def on_road(road: str, loop: Any, task: Task) -> tuple[list[Message], int]:
    """The conversation, and the trained tokens that the session server has of it."""

    async def main() -> tuple[list[Message], int]:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            url = f"{road}/sessions/{(await client.post(f'{road}/sessions')).json()['session_id']}"
            messages = await loop(Chat(client, f"{url}/v1", {"max_tokens": 3, "temperature": 1.0}), task)
            taken = decode_samples((await client.post(f"{url}/samples")).content)
            return messages, sum(int(t.loss_mask.sum()) for t in taken)

    return asyncio.run(main())


def test_an_agent_on_the_road(road: str) -> None:
    label = {
        "files": {"check.py": "assert open('out.txt').read() == 'done'\nopen('reward.txt', 'w').write('0.25')"},
        "command": [sys.executable, "check.py"],
    }
    task = Task(messages=ASK.messages, label=label)
    mark = "98761.5"
    messages, trained = on_road(road, AgentLoop(agent=[sys.executable, "-c", AGENT, mark], verifier=run_tests), task)
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "verifier"]
    assert verdict(messages, label) == 0.25
    assert 0 < trained <= 6
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_an_agent_that_hangs_is_ended_and_verified(road: str) -> None:
    loop = AgentLoop(agent=["sleep", "98762.5"], verifier=lambda folder, label: 0.0, seconds=0.2)
    with pytest.raises(RuntimeError, match="'time: ' before its first request"):
        on_road(road, loop, ASK)
    with pytest.raises(RuntimeError, match="cannot start"):
        on_road(road, AgentLoop(agent=["/no/such"], verifier=lambda folder, label: 0.0), ASK)


def test_an_agent_that_is_a_coroutine(road: str) -> None:
    async def agent(base_url: str, folder: Path, task: Task) -> None:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            body = {"messages": task.messages, "max_tokens": 2}
            (await client.post(f"{base_url}/chat/completions", json=body)).raise_for_status()
        (folder / "x").write_text("y")
        await asyncio.sleep(99)

    async def check(folder: Path, label: Any) -> bool:
        return (folder / "x").read_text() == "y"

    messages, trained = on_road(road, AgentLoop(agent=agent, verifier=check, seconds=5), ASK)
    assert verdict(messages, None) is True
    assert messages[-1]["content"].startswith("agent: time")
    assert trained > 0


def test_the_tool_loop_on_the_road(road: str) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    messages, trained = on_road(road, ToolLoop(turns=2), Task(messages=ASK.messages, tools=tools, toolbox=TOOLBOX))
    assert messages[1]["role"] == "assistant"
    assert trained > 0
