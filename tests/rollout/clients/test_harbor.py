"""Harbor's terminus-2 in a shell: it appends, overflows, hands off, grafts; nothing is lost or trained twice."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import JSONResponse

from tests.rollout.clients.policy import ANSWER, DONE, FLOOD, LOOK, THOUGHT, keys, only

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat
    from tests.rollout.conftest import ScriptedEngine

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="terminus-2 needs tmux")
KINDS = {
    "You are about to hand off": "summary",
    "You are picking up work": "questions",
    "The next agent has a few": "answers",
    "Here are the answers": "handoff",
}
HANDOFF = ["summary", "questions", "answers", "handoff"]
WINDOW = {"max_input_tokens": 100_000, "max_output_tokens": 1000, "input_cost_per_token": 0, "output_cost_per_token": 0}


def overflow() -> JSONResponse:
    """SGLang's answer to a prompt that is too long."""
    text = "The input (5000 tokens) is longer than the model's context length (4096 tokens)."
    return JSONResponse(
        {"object": "error", "message": text, "type": "BadRequestError", "param": None, "code": 400}, 400
    )


def says(*texts: str, stop: str = "<|user|>") -> list[str]:
    """The policy's moves: a thought, a text, the stop token."""
    return [f"{THOUGHT}</think>{text}{stop}" for text in texts]


@pytest.fixture
def trial(tmp_path: Path) -> Any:
    """`terminal.run_trial` in a directory of its own; gives what it gives."""
    pytest.importorskip("harbor", reason="harbor is missing: run make install, or see scripts/install.py")
    from tests.rollout.clients.terminal import run_trial

    return lambda seat, **options: run_trial(tmp_path / "trial", seat.url, **options)


def kinds(records: Sequence[dict[str, Any]]) -> list[str]:
    """What each turn was to the agent, by how its prompt starts; checks that it hangs where that kind belongs."""
    found: list[str] = []
    last: dict[str, int] = {}
    for place, record in enumerate(records):
        content = record["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[0]["text"]
        kind = next((kind for start, kind in KINDS.items() if text.startswith(start)), "turn")
        before = {"turn": "line", "summary": "line", "answers": "summary"}.get(kind)
        assert record["parent"] == (None if before is None else last.get(before))
        last["line" if kind in ("turn", "handoff") else kind] = place
        found.append(kind)
    return found


def spans(samples: Sequence[Any]) -> list[str]:
    """Each sample's roles by initials; a capital was generated."""
    return sorted(
        "".join(role[0].upper() if generated else role[0] for role, *_, generated in sample.spans) for sample in samples
    )


def test_it_appends(scripted_seat: Seat, trial: Any, engine: ScriptedEngine) -> None:
    """A command, an answer that it cannot parse, an engine that fails once, and the end that it asks to confirm."""
    seat = scripted_seat
    seat.play(*says(keys("echo hi > hello.txt"), ANSWER), JSONResponse({}, 500), *says(DONE, DONE))
    context, work = trial(seat, collect_rollout_details=True)
    assert (work / "hello.txt").read_text() == "hi\n"
    assert len(engine.bodies) == 5
    records = seat.records()
    assert kinds(records) == ["turn"] * 4
    assert "parsing errors" in records[2]["messages"][0]["content"]
    samples = seat.check()
    assert spans(samples) == ["uAuAuAuA"]
    seat.check_script(samples)
    assert seat.script is not None
    [details] = context.rollout_details  # what the agent itself learnt of its tokens
    assert details["prompt_token_ids"] == seat.script.prompts
    for ids, logprobs, (text, sent) in zip(
        details["completion_token_ids"], details["logprobs"], seat.script.sampled, strict=True
    ):
        assert seat.tokenizer.decode(ids) == text
        assert logprobs == sent
    used = sum(record["completion_tokens"] for record in records)
    assert (context.n_input_tokens, context.n_output_tokens) == (sum(map(len, seat.script.prompts)), used)


@pytest.mark.parametrize(
    "options",
    [
        {"interleaved_thinking": True},
        {"model_name": "openai/claude-policy"},  # text becomes text parts, other ones each turn
        {"llm_kwargs": {"api_key": "unused", "max_retries": 0}, "session_id": "mine", "temperature": 0.7},
    ],
    ids=["reasoning sent back", "text parts", "fields of its own"],
)
def test_the_same_history_in_other_words(scripted_seat: Seat, trial: Any, options: dict[str, Any]) -> None:
    scripted_seat.play(*says(LOOK, ANSWER, DONE, DONE))
    trial(scripted_seat, **options)
    records = scripted_seat.records()
    assert kinds(records) == ["turn"] * 4
    parts = [isinstance(message["content"], list) for record in records for message in record["messages"]]
    assert all(parts) if "model_name" in options else not any(parts)
    samples = scripted_seat.check()
    assert spans(samples) == ["uAuAuAuA"]
    scripted_seat.check_script(samples)


@pytest.mark.parametrize("thinks", [True, False])
def test_reasoning_that_stays_in_the_text(scripted_seat: Seat, trial: Any, thinks: bool) -> None:
    """An engine without a reasoning parser; a leading <think> block is what litellm takes out unless told not to."""
    seat = scripted_seat
    assert seat.script is not None
    seat.script.reasoning = False
    start = "" if thinks else "<think>"
    seat.play(*[f"{start}{move}" for move in says(LOOK, DONE, DONE)])
    body = {"chat_template_kwargs": {"enable_thinking": thinks}}
    trial(seat, llm_call_kwargs={"extra_body": body})
    records = seat.records()
    assert kinds(records) == ["turn"] * 3
    assert records[0]["response"]["content"] == f"{start}{THOUGHT}</think>{LOOK}"
    samples = seat.check()
    assert spans(samples) == ["uAuAuA"]
    seat.check_script(samples)


def test_an_answer_that_ends_by_length(scripted_seat: Seat, trial: Any) -> None:
    """It complains to the model, with the truncated answer in the history."""
    seat = scripted_seat
    seat.play(f"{THOUGHT}</think>{LOOK[:40]}", *says(DONE, DONE))
    trial(seat)
    records = seat.records()
    assert kinds(records) == ["turn"] * 3
    assert records[0]["finish_reason"] == "length"
    assert records[1]["messages"][0]["content"].startswith("ERROR!!")
    samples = seat.check()
    assert spans(samples) == ["uAuAuA"]
    seat.check_script(samples)


def test_an_overflow_and_its_handoff(scripted_seat: Seat, trial: Any, engine: ScriptedEngine) -> None:
    """Summary in the old history, questions in a new one, answers in the old, and on with a grafted answer."""
    seat = scripted_seat
    seat.play(*says(LOOK), overflow(), *says("a summary", "questions", "answers", LOOK, DONE, DONE))
    trial(seat)
    assert len(engine.bodies) == 8  # the overflow was told once, and not retried
    assert kinds(seat.records()) == ["turn", *HANDOFF, "turn", "turn"]
    samples = seat.check()
    assert spans(samples) == ["uA", "uAuAuA", "uuauAuAuA"]
    seat.check_script(samples)


def test_summaries_before_the_window_is_full(scripted_seat: Seat, trial: Any) -> None:
    seat = scripted_seat
    seat.play(*says(LOOK, "summary 1", "questions 1", "answers 1", LOOK, "summary 2", "questions 2", "answers 2", DONE))
    trial(
        seat,
        max_turns=3,
        model_name="openai/policy-window",
        model_info=WINDOW,
        proactive_summarization_threshold=99_500,
    )
    assert kinds(seat.records()) == ["turn", *HANDOFF, *HANDOFF]
    samples = seat.check()
    assert spans(samples) == ["uA", "uA", "uAuAuA", "uuauA", "uuauAuAuA"]
    seat.check_script(samples)


def test_an_overflow_that_no_summary_helps(scripted_seat: Seat, trial: Any, engine: ScriptedEngine) -> None:
    """Each fallback overflows too; then it goes on as if nothing had been said."""
    seat = scripted_seat
    seat.play(*says(LOOK), overflow(), overflow(), overflow(), overflow(), *says(DONE, DONE))
    trial(seat)
    assert len(engine.bodies) == 7
    assert kinds(seat.records()) == ["turn"] * 3
    samples = seat.check()
    assert spans(samples) == ["uAuAuA"]
    seat.check_script(samples)


def test_an_overflow_is_known_as_one(scripted_seat: Seat, trial: Any, engine: ScriptedEngine) -> None:
    scripted_seat.play(*says(LOOK), overflow())
    with pytest.raises(Exception) as caught:
        trial(scripted_seat, enable_summarize=False)
    assert type(caught.value).__name__ == "ContextLengthExceededError"
    assert len(engine.bodies) == 2
    assert spans(scripted_seat.check()) == ["uA"]


def test_on_the_embedded_engine_it_appends(embedded_seat: Seat, trial: Any, tokenizer: Any) -> None:
    """The policy looks, is not understood or is done, at random."""
    trial(embedded_seat, max_turns=5, llm_call_kwargs={"logit_bias": only(tokenizer, LOOK, ANSWER, DONE)})
    turns = kinds(embedded_seat.records())
    assert turns == ["turn"] * len(turns)
    assert 2 <= len(turns) <= 5
    assert spans(embedded_seat.check()) == ["uA" * len(turns)]


def test_on_the_embedded_engine_it_hands_off(embedded_seat: Seat, trial: Any, tokenizer: Any) -> None:
    """The policy floods the terminal until the engine's context overflows."""
    trial(embedded_seat, max_turns=2, llm_call_kwargs={"logit_bias": only(tokenizer, FLOOD)})
    assert kinds(embedded_seat.records()) == ["turn", *HANDOFF]
    assert spans(embedded_seat.check()) == ["uA", "uAuAuA", "uuauA"]
