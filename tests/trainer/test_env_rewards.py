"""Rewards with a limit of time, and mathematics."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from pacenote.trainer.environments import math as mathematics
from pacenote.trainer.tasks import Task, Worth, check_labels, judge, score


def answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_a_sync_reward_holds_nothing_up() -> None:
    free = threading.Event()

    def reward(messages: list[Any], label: Any) -> float:
        return float(free.wait(60))

    async def main() -> float | None:
        waiting = asyncio.create_task(score(reward, [], None))
        await asyncio.sleep(0.05)
        free.set()  # only a loop that runs comes here
        return await waiting

    assert asyncio.run(main()) == 1.0


def test_out_of_time_is_unrewarded() -> None:
    stop = threading.Event()

    async def never(messages: list[Any], label: Any) -> float:
        await asyncio.sleep(999)
        return 1.0

    def stuck(messages: list[Any], label: Any) -> float:
        stop.wait(60)
        return 1.0

    for reward in (never, stuck):
        assert asyncio.run(judge(reward, [], None, timeout=0.05)) == Worth(None, "timeout")
    assert asyncio.run(score(stuck, [], None, timeout=0.05)) is None
    stop.set()


def test_what_a_reward_raises_comes_through() -> None:
    def own(messages: list[Any], label: Any) -> float:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        asyncio.run(score(own, [], None, timeout=60))

    def leave(messages: list[Any], label: Any) -> float:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="SystemExit"):
        asyncio.run(score(leave, [], None))


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "none"), (float("nan"), "not finite"), ("x", "not a number"), ({}, "not a number")]
)
def test_reasons(value: Any, reason: str) -> None:
    assert asyncio.run(judge(lambda m, x: value, [], None)).reason == reason


@pytest.mark.parametrize(
    ("text", "label", "worth"),
    [(r"so \boxed{0.5}", "1/2", 1.0), (r"it is $\frac{2}{4}$", r"\frac{1}{2}", 1.0), (r"\boxed{3}", 4, 0.0),
     (r"$1+x^2$", "$x^2+1$", 1.0), ("no idea", "7", 0.0), ("", "7", 0.0), (r"\boxed{3}", "{", None)],
)  # fmt: skip
def test_verified(text: str, label: Any, worth: float | None) -> None:
    assert asyncio.run(score(mathematics.verified, answer(text), label)) == worth


def test_a_comparison_that_never_ends_does() -> None:
    verifier = mathematics.Verifier(seconds=1.0, at_once=1)
    started = time.monotonic()
    assert verifier.equal("3", "$9^{9^{9^{9}}}$") is False
    assert time.monotonic() - started < 60
    assert verifier.equal("3", "$3$") is True  # another process
    verifier.close()


def test_labels_are_checked_before() -> None:
    check_labels(mathematics.verified, [Task(messages=[], label="1/2")])
    with pytest.raises(ValueError, match="label of task 2: math expects"):
        check_labels(mathematics.verified, [Task(messages=[], label=2), Task(messages=[], label="{")])
    check_labels(lambda messages, label: 1.0, [Task(messages=[], label="{")])
