"""pydantic-ai's Agent: calls that it refuses, answers as calls, streams, and histories kept as JSON."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from tests.rollout.clients.policy import ANSWER, THOUGHT

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat

SAY = f"{THOUGHT}</think>{ANSWER}<|user|>"


def call(name: str, value: object) -> str:
    """The policy's move: a call with `sides`."""
    arguments = f"<arg_key>sides</arg_key><arg_value>{value}</arg_value>"
    return f"{THOUGHT}</think><tool_call>{name}{arguments}</tool_call><|observation|>"


class Die(BaseModel):
    """A die to roll."""

    sides: int


@pytest.fixture
def model(scripted_seat: Seat) -> Any:
    """An OpenAIChatModel at the seat."""
    pytest.importorskip("pydantic_ai", reason="pydantic-ai-slim is missing: run make install")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return OpenAIChatModel("m", provider=OpenAIProvider(base_url=scripted_seat.url, api_key="x"))


def test_calls_that_it_refuses(model: Any, scripted_seat: Seat) -> None:
    """Arguments that do not validate, and a tool that asks for another try, come back as the tool's message."""
    from pydantic_ai import Agent, ModelRetry

    def roll(sides: int) -> str:
        """Roll a die."""
        if sides < 2:
            raise ModelRetry("a die has more sides")
        return "6"

    scripted_seat.play(call("roll", "many"), call("roll", 1), call("roll", 6), SAY)
    assert Agent(model, tools=[roll], retries=5).run_sync("Roll a die.").output == ANSWER
    assert scripted_seat.parents() == [None, 0, 1, 2]
    samples = scripted_seat.check()
    assert [role for role, *_ in samples[0].spans] == ["user", *["assistant", "tool"] * 3, "assistant"]
    scripted_seat.check_script(samples)


def test_an_answer_that_is_a_call(model: Any, scripted_seat: Seat) -> None:
    """A typed output is a call of a tool of its own, and a second run goes on after its result."""
    from pydantic_ai import Agent

    scripted_seat.play(call("final_result", 6), call("final_result", 8))
    agent: Any = Agent(model, output_type=Die)
    first = agent.run_sync("Roll a die.")
    second = agent.run_sync("A larger one.", message_history=first.all_messages())
    assert (first.output, second.output) == (Die(sides=6), Die(sides=8))
    assert scripted_seat.parents() == [None, 0]
    samples = scripted_seat.check()
    assert [role for role, *_ in samples[0].spans] == ["user", "assistant", "tool", "user", "assistant"]
    scripted_seat.check_script(samples)


def test_a_stream_and_a_history_kept_as_json(model: Any, scripted_seat: Seat) -> None:
    from pydantic_ai import Agent, ModelMessagesTypeAdapter

    async def go() -> tuple[str, bytes]:
        async with Agent(model).run_stream("Roll a die.") as stream:
            text = await stream.get_output()
            return text, stream.all_messages_json()

    scripted_seat.play(SAY, SAY)
    text, kept = asyncio.run(go())
    assert text == ANSWER
    assert THOUGHT in kept.decode()
    history = ModelMessagesTypeAdapter.validate_json(kept)
    assert Agent(model).run_sync("And again.", message_history=history).output == ANSWER
    assert scripted_seat.parents() == [None, 0]
    scripted_seat.check_script(scripted_seat.check())
