"""An agent with a tool on every client library, on both engines: what it sends back is what was recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import JSONResponse

from tests.rollout.clients.agents import AGENTS, QUESTIONS
from tests.rollout.clients.policy import ANSWER, CALL, THOUGHT, only

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat

SCRIPT = (
    f"{THOUGHT}</think>{CALL}<|observation|>",
    f"{THOUGHT}</think>Once more.{CALL}{CALL}<|observation|>",
    f"{THOUGHT}</think>{ANSWER}<|user|>",
    f"</think>{CALL}<|observation|>",
    f"{THOUGHT}</think>{ANSWER}<|user|>",
)


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_with_a_tool(name: str, seat: Seat, tokenizer: Any) -> None:
    module, agent, _ = AGENTS[name]
    pytest.importorskip(module)
    seat.play(*SCRIPT)
    talk = agent(seat.url, only(tokenizer, ANSWER, "<tool_call>"), QUESTIONS)
    assert talk.answers == [ANSWER] * len(QUESTIONS)
    records = seat.records()
    assert seat.parents() == [None, *range(len(records) - 1)]
    assert talk.usage == [(record["prompt_tokens"], record["completion_tokens"]) for record in records]
    assert talk.calls == sum(len(record["response"].get("tool_calls") or ()) for record in records)
    if talk.thoughts:
        assert talk.thoughts == [record["response"].get("reasoning_content") for record in records]
    samples = seat.check()
    assert len(samples) == 1
    assert [role for role, *_ in samples[0].spans].count("tool") == talk.calls
    if seat.script is not None:
        assert talk.calls == 4
        seat.check_script(samples)


@pytest.mark.parametrize("name", AGENTS)
def test_a_context_that_overflows(name: str, seat: Seat, tokenizer: Any) -> None:
    """In the second turn: each client knows it for what it is, and what was said before stands."""
    module, agent, known_as = AGENTS[name]
    pytest.importorskip(module)
    text = "Input length (9000 tokens) exceeds the maximum allowed length (4096 tokens). Use a shorter input."
    seat.play(SCRIPT[2], JSONResponse({"object": "error", "message": text, "code": 400}, 400))
    with pytest.raises(Exception) as caught:
        agent(seat.url, only(tokenizer, ANSWER), (QUESTIONS[0], "x " * 9000))
    assert type(caught.value).__name__ == known_as
    assert "tokens)" in str(caught.value)  # the engine's own numbers
    assert seat.parents() == [None]
    assert len(seat.check()) == 1
