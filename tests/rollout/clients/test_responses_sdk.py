"""openai's SDK on Responses: items there and back, streams, parsed answers, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from pydantic import BaseModel
from starlette.responses import JSONResponse

from tests.rollout.clients.policy import ANSWER, CALL, THOUGHT, TOOL

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat
    from tests.rollout.conftest import ScriptedEngine

SAY = f"{THOUGHT}</think>{ANSWER}<|user|>"
ACT = f"{THOUGHT}</think>Look.{CALL}{CALL}<|observation|>"
FUNCTION: Any = TOOL["function"]
ROLL: Any = {"type": "function", "strict": True, **FUNCTION}


class Die(BaseModel):
    """What is asked for as JSON."""

    sides: int


@pytest.fixture
def client(scripted_seat: Seat) -> Iterator[Any]:
    """The SDK's client at the scripted seat."""
    with openai.OpenAI(base_url=scripted_seat.url, api_key="x", max_retries=0) as client:
        yield client


def test_a_response(client: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    """Each field where it belongs, there and back."""
    scripted_seat.play(ACT)
    response = client.responses.create(
        model="m", instructions="Be brief.", input="Roll a die.", tools=[ROLL], tool_choice="required",
        parallel_tool_calls=True, max_output_tokens=64, temperature=0.5, reasoning={"effort": "low", "summary": "auto"},
        metadata={"run": "1"}, include=["reasoning.encrypted_content"], extra_body={"top_k": 7},
    )  # fmt: skip
    thought, said, *calls = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", THOUGHT)
    assert (said.type, said.content[0].text, response.output_text) == ("message", "Look.", "Look.")
    assert [(call.name, call.arguments) for call in calls] == [("roll", '{"sides": 6}')] * 2
    assert len({item.id for item in response.output}) == 4
    assert (response.status, response.incomplete_details, response.error) == ("completed", None, None)
    assert (response.metadata, response.instructions) == ({"run": "1"}, "Be brief.")
    [body], [record] = engine.bodies, scripted_seat.records()
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    kept = ("temperature", "top_k", "max_tokens", "tool_choice", "reasoning_effort", "parallel_tool_calls")
    assert [body[name] for name in kept] == [0.5, 7, 64, "required", "low", True]
    assert body["tools"] == [{"type": "function", "function": FUNCTION | {"strict": True}}]
    assert response.id == f"resp_{record['id'].removeprefix('chatcmpl-')}"
    assert response.usage.total_tokens == record["prompt_tokens"] + record["completion_tokens"]
    scripted_seat.check_script(scripted_seat.check())


def test_a_stream_says_what_the_response_says(client: Any, scripted_seat: Seat) -> None:
    scripted_seat.play(ACT, ACT)
    whole = client.responses.create(model="m", input="Roll a die.", tools=[ROLL])
    events = list(client.responses.create(model="m", input="Roll a die.", tools=[ROLL], stream=True))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert not events[0].response.output
    deltas = {kind: "".join(event.delta for event in events if event.type == f"response.{kind}.delta")
              for kind in ("reasoning_text", "output_text", "function_call_arguments")}  # fmt: skip
    assert deltas == {
        "reasoning_text": THOUGHT, "output_text": "Look.", "function_call_arguments": '{"sides": 6}{"sides": 6}',
    }  # fmt: skip
    streamed, drawn = events[-1].response, {"id", "call_id", "created_at"}
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.model_dump() for item in done] == [item.model_dump() for item in streamed.output]
    assert [item.model_dump(exclude=drawn) for item in streamed.output] == [
        item.model_dump(exclude=drawn) for item in whole.output
    ]
    assert streamed.model_dump(exclude=drawn | {"output"}) == whole.model_dump(exclude=drawn | {"output"})


def test_an_answer_that_was_cut(client: Any, scripted_seat: Seat) -> None:
    """Inside its thought, too: the history that comes back is the stored one."""
    scripted_seat.play("The die", SAY)
    with client.responses.stream(model="m", input="Roll a die.") as stream:
        kinds = [event.type for event in stream]
    assert kinds[-1] == "response.incomplete"
    [record] = scripted_seat.records()
    assert record["finish_reason"] == "length"
    assert record["response"]["reasoning_content"] == "The die"
    history: Any = [
        {"role": "user", "content": "Roll a die."},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "The die"}]},
        {"role": "developer", "content": [{"type": "input_text", "text": "Go on."}]},
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", input=history)
    assert caught.value.code == "role_not_allowed"  # it was found, and developer is system
    history[-1]["role"] = "user"
    assert client.responses.create(model="m", input=history).output_text == ANSWER
    assert scripted_seat.parents() == [None, 0]


def test_reasoning_may_be_left_out(client: Any, scripted_seat: Seat) -> None:
    scripted_seat.play(ACT, SAY)
    first = client.responses.create(model="m", input="Roll a die.", tools=[ROLL])
    history = [{"role": "user", "content": "Roll a die."}, *first.output[1:]]
    history += [{"type": "function_call_output", "call_id": call.call_id, "output": "6"} for call in first.output[2:]]
    client.responses.create(model="m", input=history, tools=[ROLL])
    assert scripted_seat.parents() == [None, 0]
    scripted_seat.check_script(scripted_seat.check())


def test_a_parsed_answer(client: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    scripted_seat.play(f'{THOUGHT}</think>{{"sides": 6}}<|user|>')
    assert client.responses.parse(model="m", input="Which die?", text_format=Die).output_parsed == Die(sides=6)
    assert engine.bodies[0]["response_format"]["json_schema"]["name"] == "Die"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(
    client: Any, scripted_seat: Seat, engine: ScriptedEngine, options: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({"model": "m", "input": "Roll a die."} | options))
    assert (caught.value.param, caught.value.code) == (param, "bad_request")
    assert engine.bodies == []
    assert scripted_seat.records() == []


def test_errors_are_openais(client: Any, scripted_seat: Seat) -> None:
    scripted_seat.play(JSONResponse({"message": "no"}, 500))
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model="m", input="Roll a die.", stream=True)
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_error")
    assert httpx.delete(scripted_seat.url.removesuffix("/v1"), trust_env=False).status_code == 204
    with pytest.raises(openai.APIStatusError) as gone:
        client.responses.create(model="m", input="Roll a die.")
    assert (gone.value.status_code, gone.value.code) == (410, "session_deleted")


def test_one_history_in_three_dialects(client: Any, scripted_seat: Seat) -> None:
    """A session is one tree, whichever way an agent asks."""
    scripted_seat.play(SAY, SAY, SAY)
    user: Any = {"role": "user", "content": "Roll a die."}
    first = client.responses.create(model="m", input=[user])
    history: Any = [user, {"role": "assistant", "content": first.output_text}, user]
    second = client.chat.completions.create(model="m", messages=history)
    history += [{"role": "assistant", "content": second.choices[0].message.content}, user]
    body = {"model": "m", "max_tokens": 8, "messages": history}
    third = httpx.post(f"{scripted_seat.url}/messages", json=body, trust_env=False)
    assert third.json()["content"][1]["text"] == ANSWER
    assert scripted_seat.parents() == [None, 0, 1]
    scripted_seat.check_script(scripted_seat.check())
