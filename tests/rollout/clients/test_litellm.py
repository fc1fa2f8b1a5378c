"""litellm's own habits: what it takes out of an answer, its retries, its timeouts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import JSONResponse

from tests.rollout.clients.policy import ANSWER, THOUGHT

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat
    from tests.rollout.conftest import ScriptedEngine

WAIT = 30  # seconds after which something that should come is taken not to come
SAY = f"{THOUGHT}</think>{ANSWER}<|user|>"
USER = {"role": "user", "content": "Roll a die."}
MORE = {"role": "user", "content": "And again."}


@pytest.fixture(scope="module")
def litellm() -> Any:
    """The module."""
    return pytest.importorskip("litellm", reason="litellm is missing: run make install, or see scripts/install.py")


def ask(litellm: Any, seat: Seat, messages: list[Any], **options: Any) -> Any:
    """The message of an answer."""
    answer = litellm.completion(model="openai/m", api_base=seat.url, api_key="x", messages=messages, **options)
    if options.get("stream"):
        answer = litellm.stream_chunk_builder(list(answer))
    return answer.choices[0].message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinks", [False, True])
def test_a_think_block_in_the_text_stays(litellm: Any, scripted_seat: Seat, thinks: bool, stream: bool) -> None:
    """An engine without a reasoning parser. litellm would take a leading block out, and what it sends back would be
    another message; that an answer says `reasoning_content: null` keeps it."""
    assert scripted_seat.script is not None
    scripted_seat.script.reasoning = False
    text = f"{THOUGHT}</think>\n{ANSWER}" if thinks else f"<think>{THOUGHT}</think>\n{ANSWER}"
    scripted_seat.play(f"{text}<|user|>", f"{text}<|user|>")
    body = {"chat_template_kwargs": {"enable_thinking": thinks}}
    message = ask(litellm, scripted_seat, [USER], stream=stream, extra_body=body)
    assert message.content == text
    ask(litellm, scripted_seat, [USER, message, MORE], stream=stream, extra_body=body)
    assert scripted_seat.parents() == [None, 0]
    scripted_seat.check_script(scripted_seat.check())


def test_a_failing_engine_is_asked_again(litellm: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    scripted_seat.play(JSONResponse({}, 500), JSONResponse({}, 429), SAY)
    message = ask(litellm, scripted_seat, [USER], num_retries=3)
    assert message.content == ANSWER
    assert message.reasoning_content == THOUGHT
    assert len(engine.bodies) == 3
    assert scripted_seat.parents() == [None]
    scripted_seat.check_script(scripted_seat.check())


def test_a_timeout_is_a_retry(litellm: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    scripted_seat.play(SAY)
    engine.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, litellm, scripted_seat, [USER], timeout=1.5, num_retries=5)
        assert engine.aborted.acquire(timeout=WAIT)
        engine.release()
        assert answer.result(WAIT).content == ANSWER
    assert [record["status"] for record in scripted_seat.records()] == ["completed"]
    scripted_seat.check_script(scripted_seat.check())


def test_a_role_that_may_not_be_appended_is_told_once(litellm: Any, scripted_seat: Seat) -> None:
    """A 400 is the caller's to put right: litellm says what the server said."""
    with pytest.raises(litellm.BadRequestError, match=r"messages\[0\].role must be one of"):
        ask(litellm, scripted_seat, [{"role": "judge", "content": "x"}])
    assert scripted_seat.records() == []
