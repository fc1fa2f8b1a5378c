"""Held-out prompts and their columns."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import letters
from pacenote.trainer.episode import Episode
from pacenote.trainer.evaluate import EvalConfig, due, held_out, of_evaluation, pass_at_k
from pacenote.trainer.tasks import Task

TASK = Task(messages=[{"role": "user", "content": "x"}])


def episode(reward: float | None, trajectories: list[Trajectory] | None = None, error: str | None = None) -> Episode:
    return Episode(TASK, TASK.messages, reward, trajectories or [], error)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_the_draws(numbers: tuple[int, int, int]) -> None:
    total, right, k = numbers
    draws = list(itertools.combinations([i < right for i in range(total)], k))
    assert pass_at_k(total, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_columns(trajectories: list[Trajectory]) -> None:
    got = of_evaluation(
        [episode(1.0, trajectories[:1]), episode(0.0, trajectories[1:2]), episode(None), episode(0.5),
         episode(None, error="gone"), episode(None)], 2
    )  # fmt: skip
    assert got == {
        "eval_reward": 0.5, "eval_reward_stderr": 0.0, "eval_episodes": 6, "eval_failed": 1, "eval_unrewarded": 2,
        "eval_length_mean": float(trajectories[0].loss_mask.sum()), "eval_pass_at_1": pytest.approx(1 / 6),
        "eval_pass_at_2": pytest.approx(1 / 3),
    }  # fmt: skip
    single = of_evaluation([episode(1.0), episode(0.0), episode(0.0), episode(0.0)], 1)
    assert single["eval_reward"] == 0.25
    assert single["eval_reward_stderr"] == pytest.approx(0.25)
    assert not [name for name in single if "pass" in name]
    none = of_evaluation([episode(None, error="gone")], 1)
    assert none["eval_reward"] is none["eval_reward_stderr"] is none["eval_length_mean"] is None
    with pytest.raises(ValueError, match="multiple of 2"):
        of_evaluation([episode(1.0)], 2)


@given(seed=st.integers(0, 2**31), step=st.integers(0, 50))
def test_held_out_tasks_are_other_draws(seed: int, step: int) -> None:
    asked: list[tuple[int, int]] = []

    def source(*, seed: int, step: int, count: int) -> list[Task]:
        asked.append((seed, step))
        return letters.make_tasks(seed=seed, step=step, count=count)

    config = EvalConfig(every=1, prompts=8)
    assert held_out(config, source, seed=seed) == held_out(config, source, seed=seed)
    assert (seed, step) not in asked


def test_held_out_file(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text("".join(json.dumps({"messages": TASK.messages, "label": i}) + "\n" for i in range(5)))
    config = EvalConfig(every=1, data=path, prompts=3)
    assert [task.label for task in held_out(config, letters.make_tasks, seed=0, training=path)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"--eval\.every expects --eval\.data"):
        held_out(EvalConfig(every=1), letters.make_tasks, seed=0, training=path)


def test_due() -> None:
    assert [step for step in range(8) if due(EvalConfig(every=3), step, 7)] == [0, 3, 6, 7]
    assert not any(due(EvalConfig(), step, 7) for step in range(8))


@pytest.mark.parametrize(
    ("given", "says"),
    [({"every": -1}, "every"), ({"prompts": 0}, "prompts"), ({"samples": 2}, "one answer 2 times"),
     ({"temperature": math.nan}, "temperature"), ({"max_tokens": 0}, "max-tokens")],
)  # fmt: skip
def test_config_refuses(given: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EvalConfig(**given)  # type: ignore[arg-type]
