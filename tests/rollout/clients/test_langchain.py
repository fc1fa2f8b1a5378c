"""LangChain's ChatOpenAI: batches, retries, structured output; it drops the reasoning from what it sends back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel
from starlette.responses import JSONResponse

from tests.rollout.clients.policy import ANSWER, THOUGHT

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat
    from tests.rollout.conftest import ScriptedEngine

SAY = f"{THOUGHT}</think>{ANSWER}<|user|>"


class Die(BaseModel):
    """A die to roll."""

    sides: int


@pytest.fixture
def model(scripted_seat: Seat) -> Any:
    """A ChatOpenAI at the seat, with its own retries."""
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is missing: run make install")
    return module.ChatOpenAI(model="m", base_url=scripted_seat.url, api_key="x")


def test_a_failing_engine_is_asked_again(model: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    scripted_seat.play(JSONResponse({}, 500), SAY)
    assert model.invoke("Roll a die.").content == ANSWER
    assert len(engine.bodies) == 2
    assert scripted_seat.parents() == [None]
    scripted_seat.check_script(scripted_seat.check())


def test_a_batch_is_one_root_each(model: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    async def go() -> list[Any]:
        first = await model.abatch(["one", "two", "three"])
        histories = [
            [("user", text), answer, ("user", "And again.")]
            for text, answer in zip(("one", "two", "three"), first, strict=True)
        ]
        return list(await model.abatch(histories))

    scripted_seat.play(*[SAY] * 6)
    assert [answer.content for answer in asyncio.run(go())] == [ANSWER] * 3
    records = scripted_seat.records()
    assert sorted(str(record["messages"][0]["content"]) for record in records[:3]) == ["one", "three", "two"]
    assert [record["parent"] for record in records[:3]] == [None] * 3
    assert sorted(record["parent"] for record in records[3:]) == [0, 1, 2]
    samples = scripted_seat.check()
    assert len(samples) == 3
    scripted_seat.check_script(samples)


def test_the_reasoning_that_it_drops_stays_in_the_prompt(
    model: Any, scripted_seat: Seat, engine: ScriptedEngine
) -> None:
    scripted_seat.play(SAY, SAY)
    first = model.invoke([("user", "Roll a die.")])
    assert THOUGHT not in str(first)
    model.invoke([("user", "Roll a die."), first, ("user", "And again.")])
    assert scripted_seat.tokenizer.decode(engine.bodies[1]["input_ids"]).count(THOUGHT) == 1
    assert scripted_seat.parents() == [None, 0]
    scripted_seat.check_script(scripted_seat.check())


def test_structured_output_by_a_call(model: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    call = "<tool_call>Die<arg_key>sides</arg_key><arg_value>6</arg_value></tool_call>"
    scripted_seat.play(f"{THOUGHT}</think>{call}<|observation|>")
    asked = model.with_structured_output(Die, method="function_calling")
    assert asked.invoke("Roll a die.") == Die(sides=6)
    assert engine.bodies[0]["tool_choice"]["function"]["name"] == "Die"
    scripted_seat.check_script(scripted_seat.check())
