"""The stream of groups against a real engine and session server: what is refused, broken off, played ahead, kept."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pacenote.trainer import sync
from pacenote.trainer.errors import EngineDied, TaskFailed
from pacenote.trainer.fleet import Fleet
from pacenote.trainer.game import Game
from pacenote.trainer.model import build_tiny
from pacenote.trainer.position import START, Position, load_position, save_position
from pacenote.trainer.rollout_config import RolloutConfig
from pacenote.trainer.rollouts import Rollouts, Taken
from pacenote.trainer.sync import SyncConfig
from pacenote.trainer.tasks import Chat, Message, Task
from pacenote.trainer.watch import Watch

pytestmark = pytest.mark.road
PROMPTS, GROUP = 3, 2


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The embedded engine with weights of version 0, and the session server before it."""
    root = tmp_path_factory.mktemp("fleet")
    build_tiny(sync.weights_path(root / "weights", 0), seed=0)
    config = RolloutConfig(engine_dtype="float32")
    push = SyncConfig(method="tensor", pause="in_place")
    with Fleet(config, weights=root / "weights", logs=root, seed=0, device="cpu", push=push) as fleet:
        fleet.start(0)
        yield fleet


class Play:
    """An environment that a test holds the strings of, and a reward."""

    def __init__(self) -> None:
        self.played = Counter[int]()
        self.hang: set[int] = set()
        self.same: set[int] = set()
        self.tokens = 2

    def tasks(self, *, seed: int, step: int, count: int) -> list[Task]:
        numbers = range(step * count, (step + 1) * count)
        return [Task(messages=[{"role": "user", "content": f"Say {number}"}], label=number) for number in numbers]

    async def environment(self, chat: Chat, task: Task) -> list[Message]:
        self.played[task.label] += 1
        mine = self.played[task.label]
        if task.label in self.hang and mine % GROUP == 1:
            await asyncio.sleep(600)
        if task.label == -1:
            raise ZeroDivisionError
        answer = await chat(task.messages, max_tokens=self.tokens, ignore_eos=True)
        return [*task.messages, {**answer, "member": mine}]

    def reward(self, messages: list[Message], label: int) -> float:
        return 1.0 if label in self.same else float(messages[-1]["member"] % GROUP)

    @property
    def game(self) -> Game:
        return Game(tasks=self.tasks, environment=self.environment, reward=self.reward)


@pytest.fixture
def play() -> Play:
    return Play()


@pytest.fixture
def start(fleet: Fleet, play: Play) -> Iterator[Any]:
    """Rollouts of a configuration; ended with the test."""
    with ExitStack() as stack:

        def begin(position: Position = START, **fields: Any) -> Rollouts:
            config = RolloutConfig(prompts=PROMPTS, group=GROUP, patience=60, **fields)
            rollouts = Rollouts(play.game, config, sessions=fleet.sessions_url, seed=1, position=position)
            return stack.enter_context(rollouts)

        yield begin


def take(rollouts: Rollouts, newest: int = 0) -> Taken:
    return rollouts.take(newest, Watch())


def numbers(taken: Taken) -> list[int]:
    return [group.number for group in taken.groups]


def refused(taken: Taken) -> dict[str, int]:
    return {reason: count for reason, count in taken.refused.items() if count}


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_step_is_its_groups_in_order(start: Any) -> None:
    rollouts = start()
    one, other = take(rollouts), take(rollouts)
    assert (numbers(one), numbers(other)) == ([0, 1, 2], [3, 4, 5])
    assert [episode.task.label for episode in one.episodes] == [0, 0, 1, 1, 2, 2]
    assert all(episode.error is None and episode.trajectories for episode in one.episodes)
    assert rollouts.position == Position(next=6)


def test_the_same_seed_says_the_same(start: Any) -> None:
    one, other = take(start()), take(start())
    pairs = zip(one.episodes, other.episodes, strict=True)
    assert all(np.array_equal(a.trajectories[0].tokens, b.trajectories[0].tokens) for a, b in pairs)


def test_groups_without_a_signal_are_replaced(start: Any, play: Play) -> None:
    play.same = {0, 2, 3}
    taken = take(start(dynamic_sampling=True))
    assert (numbers(taken), refused(taken)) == ([1, 4, 5], {"zero_std": 3})
    play.same = set(range(100))
    taken = take(start(dynamic_sampling=True, max_tries=2))
    assert (numbers(taken), refused(taken)) == ([], {"zero_std": 6})
    play.same = {0}
    assert numbers(take(start())) == [0, 1, 2]


def test_what_is_begun_in_excess_is_broken_off_and_played_again(start: Any, play: Play) -> None:
    play.hang = {1, 2}
    rollouts = start(oversample=0.6)
    assert numbers(take(rollouts)) == [0, 3, 4]
    assert rollouts.position.again == (1, 2)
    play.hang = set()
    assert set(numbers(take(rollouts))) <= {1, 2, 5, 6, 7}
    assert play.played[1] + play.played[2] > 2 * GROUP


def test_a_slow_episode_holds_up_nobody(start: Any, play: Play) -> None:
    play.hang = {1}
    taken = take(start(episode_timeout=2.0))
    assert numbers(taken) == [0, 1, 2]
    slow = [episode for episode in taken.episodes if episode.error]
    assert [(e.task.label, e.reward) for e in slow] == [(1, None)]
    assert "longer than 2 s (--rollout.episode-timeout)" in str(slow[0].error)


def test_ahead_of_the_trainer_up_to_a_bound(start: Any, play: Play) -> None:
    rollouts = start(ahead=2, max_staleness=2)
    assert len(numbers(take(rollouts))) == PROMPTS
    until(lambda: len(rollouts.position.ready) == 2 * PROMPTS)
    time.sleep(0.3)
    position = rollouts.position
    assert (len(position.ready), position.again, position.next) == (2 * PROMPTS, (), 3 * PROMPTS)
    before = play.played.total()
    assert numbers(take(rollouts)) == [3, 4, 5]  # they were there
    until(lambda: play.played.total() > before)


def test_what_became_too_old_is_left_out(start: Any) -> None:
    rollouts = start(ahead=1, max_staleness=1)
    take(rollouts)
    until(lambda: len(rollouts.position.ready) == PROMPTS)
    taken = take(rollouts, newest=2)  # the engine still serves 0
    assert (numbers(taken), refused(taken)["stale"] >= PROMPTS) == ([], True)


def test_a_person_stops_it_and_nothing_is_lost(start: Any, play: Play, tmp_path: Path) -> None:
    """A stop while groups are at play: what came back is kept, in a checkpoint as well, and the rest played again."""
    play.hang = {1}
    rollouts = start()

    def stop() -> None:
        if play.played[2] == GROUP and len(rollouts._state.running) > 0 and time.monotonic() > end:
            raise KeyboardInterrupt

    end = time.monotonic() + 2
    with pytest.raises(KeyboardInterrupt):
        rollouts.take(0, Watch([stop]))
    position = rollouts.position
    assert (position.next, position.again, [group.number for group in position.ready]) == (3, (1,), [0, 2])
    save_position(tmp_path, position)
    again = load_position(tmp_path, lambda number: play.game.task(number, seed=1, prompts=PROMPTS))
    assert (again.next, again.again) == (position.next, position.again)
    for one, other in zip(again.ready, position.ready, strict=True):
        for a, b in zip(one.episodes, other.episodes, strict=True):
            assert (a.task, a.messages, a.reward, a.error) == (b.task, b.messages, b.reward, b.error)
            assert np.array_equal(a.trajectories[0].experts, b.trajectories[0].experts)  # type: ignore[arg-type]
    play.hang, played = set(), Counter(play.played)
    assert numbers(take(start(position=again))) == [0, 1, 2]
    assert play.played - played == Counter({1: GROUP})


def test_a_damaged_position_is_named(tmp_path: Path) -> None:
    (tmp_path / "stream.json").write_text('{"next": 3}')
    with pytest.raises(ValueError, match=r"stream.json cannot be read \(KeyError: 'ready'\): delete"):
        load_position(tmp_path, lambda number: Task(messages=[]))


def test_an_environment_that_raises(start: Any, play: Play) -> None:
    tasks = play.tasks

    def broken(*, seed: int, step: int, count: int) -> list[Task]:
        return [
            Task(messages=[], label=-1) if task.label == 4 else task
            for task in tasks(seed=seed, step=step, count=count)
        ]

    play.tasks = broken  # type: ignore[method-assign]
    for fields in ({}, {"ahead": 2, "max_staleness": 2}):
        rollouts = start(**fields)
        taken: list[Taken] = []
        with pytest.raises(TaskFailed, match="ZeroDivisionError"):
            taken += [take(rollouts) for _ in range(3)]
        position = rollouts.position
        kept = {*position.again, *(group.number for group in position.ready)}
        assert kept >= {4}
        assert kept | {0, 1, 2} == set(range(position.next))


def test_nobody_answers(play: Play) -> None:
    config = RolloutConfig(prompts=PROMPTS, group=GROUP)
    with Rollouts(play.game, config, sessions="http://127.0.0.1:9", seed=0) as rollouts:
        with pytest.raises(EngineDied, match=r"no episode of 3 groups came back; the first failed with: ConnectError"):
            take(rollouts)
        assert rollouts.position == Position(next=3, again=(0, 1, 2))


def test_an_answer_goes_on_over_new_weights(fleet: Fleet, start: Any, play: Play, tmp_path: Path) -> None:
    """Each token has the version of its own weights, and the row that they chose."""
    play.tokens = 300
    rollouts = start(ahead=1, max_staleness=9)
    rollouts._call(_begin(rollouts)).result()
    until(lambda: play.played.total() >= PROMPTS * GROUP)
    time.sleep(0.5)
    build_tiny(tmp_path / "000001", seed=5)
    fleet.serve(sync.saved_weights(tmp_path / "000001"), 1)
    taken = take(rollouts, newest=1)
    versions = [episode.trajectories[0].version for episode in taken.episodes]
    mixed = [version for version in versions if {0, 1} <= set(version.tolist())]
    assert mixed
    generated = taken.episodes[0].trajectories[0].loss_mask.astype(bool)
    assert all((np.diff(version[generated]) >= 0).all() for version in versions)


async def _begin(rollouts: Rollouts) -> None:
    rollouts._fill()
