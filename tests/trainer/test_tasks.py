"""Tasks, environments and rewards."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.kernels.policy import PolicyConfig
from pacenote.trainer import letters, recipes, tasks
from pacenote.trainer.config import RunConfig, dump, parse
from pacenote.trainer.game import Game


def test_letters_tasks_follow_seed_and_step() -> None:
    def make(seed: int, step: int) -> list[tasks.Task]:
        return letters.make_tasks(seed=seed, step=step, count=16)

    assert make(0, 3) == make(0, 3)
    assert make(0, 3) != make(0, 4)
    assert make(0, 3) != make(1, 3)
    kinds = {(task.label["first"], task.label["second"]) for step in range(10) for task in make(0, step)}
    assert len(kinds) == 4
    assert all(task.label["first"] in task.messages[0]["content"] for task in make(0, 0))


@pytest.mark.parametrize(
    ("text", "kind", "worth"),
    [("abc", "letters", 1.0), ("abc", "signs", 0.0), ("a1!", "letters", 1 / 3), (" a b c ", "letters", 1.0),
     ("", "letters", 0.0), ("a", "letters", 1 / 3), ("\ufffd\ufffd\ufffd", "signs", 1.0)],
)  # fmt: skip
def test_share(text: str, kind: str, worth: float) -> None:
    assert letters.share(text, kind) == pytest.approx(worth)


@given(st.text(max_size=12))
def test_shares_add_up(text: str) -> None:
    """Letters and signs are complements, so ignoring the message earns a half at best."""
    both = letters.share(text, "letters") + letters.share(text, "signs")
    assert both <= 1.0 + 1e-9
    if len("".join(text.split())) >= letters.SHORTEST:
        assert both == pytest.approx(1.0)


def test_reward_reads_both_turns() -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "abc"},
            {"role": "tool", "content": "y"}, {"role": "assistant", "content": "1;2"}]  # fmt: skip
    assert letters.reward(talk, {"first": "letters", "second": "signs"}) == 1.0
    assert letters.reward(talk, {"first": "letters", "second": "letters"}) == 0.5
    talk[1]["content"] = None  # type: ignore[assignment]  # a tool call without text
    assert letters.reward(talk, {"first": "letters", "second": "signs"}) == 0.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (True, 1.0), (None, None), (math.nan, None), (math.inf, None), ({"a": 1}, None), ("x", None)],
)
def test_odd_rewards_never_crash(value: Any, expected: float | None) -> None:
    assert asyncio.run(tasks.score(lambda messages, label: value, [], None)) == expected

    async def later(messages: list[tasks.Message], label: Any) -> Any:
        return value

    assert asyncio.run(tasks.score(later, [], None)) == expected


GOOD = {"messages": [{"role": "user", "content": "2+2"}], "label": "4"}


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "line 2: not JSON"), ("[1]", "line 2: expected an object"), ("{}", "line 2: expected 'messages'"),
     ('{"messages": []}', "line 2: expected 'messages'"), ('{"messages": ["x"]}', r"line 2: messages\[0\]"),
     ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 2: the last message")],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tasks.read_jsonl(write(tmp_path / "data.jsonl", json.dumps(GOOD), line))


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        tasks.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no rows"):
        tasks.read_jsonl(write(tmp_path / "empty.jsonl", ""))


@given(rows=st.integers(1, 7), count=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_row_once_an_epoch(rows: int, count: int, seed: int) -> None:
    source = tasks.JsonlTasks(tuple(tasks.Task(messages=[], label=i) for i in range(rows)))
    stream = [task.label for step in range(2 * rows) for task in source(seed=seed, step=step, count=count)]
    for epoch in range(len(stream) // rows):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@pytest.mark.parametrize(
    ("path", "says"),
    [("nodots", "import path"), ("no.such.module:x", "cannot import"), ("json:nope", "no callable 'nope'")],
)
def test_bad_import_paths(path: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tasks.load_callable(path, "reward")


def test_game_takes_the_file_over_the_task(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", json.dumps(GOOD))
    plain = Game.load(RunConfig(recipe="tiny"))
    assert plain.environment is letters.play
    own = Game.load(RunConfig(recipe="tiny", data=data))
    assert own.environment is tasks.single_turn
    assert own.reward([{"role": "assistant", "content": "it is 4"}], "4") == 1.0
    mixed = Game.load(RunConfig(recipe="tiny", data=data, reward="pacenote.trainer.letters:reward"))
    assert mixed.reward is letters.reward


def test_config_round_trip(tmp_path: Path) -> None:
    config = RunConfig(recipe="tiny", out=tmp_path, data=tmp_path / "x.jsonl", replay="off")
    assert parse(dump(config)) == config
    assert parse(dump(recipes.tiny())) == recipes.tiny()
    loss = PolicyConfig(ratio="sequence", clip_high=float("inf"), icepop=(0.5, 2.0), mis=(0.0, 5.0), normalize="group")
    assert parse(dump(RunConfig(recipe="tiny", loss=loss))).loss == loss


def test_config_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"--reference expects --loss\.kl-coef above 0"):
        RunConfig(recipe="tiny", reference=Path("m"))
    with pytest.raises(ValueError, match=r"--overlong-buffer expects 0 to --rollout\.max-tokens 3, got 4"):
        RunConfig(recipe="tiny", overlong_buffer=4)
    with pytest.raises(ValueError, match="--steps expects at least 1, got 0"):
        RunConfig(recipe="tiny", steps=0)
    with pytest.raises(ValueError, match=r"config\.json"):
        parse("{}}")
    with pytest.raises(ValueError, match=r"config\.json"):
        parse('{"recipe": "tiny", "unknown_field": 1}')
    with pytest.raises(ValueError, match=r"unknown recipe .big.; the recipes are: .*, tiny"):
        recipes.find("big")
