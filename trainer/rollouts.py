"""The endless stream of groups: tasks in order, each played several times, in a thread of its own.

Synchronous (`ahead` 0): nothing runs but for a step that waits for it, so that a seeded run repeats itself. Ahead:
groups go on being played while the trainer learns, through updates of the weights, up to a bound; those that have
become too old are left out. Either way a group that is refused is counted with its reason and another one played, a
slow episode holds up its own group alone, and a group that was broken off is played again.

Group number n of a run is always of the same task with the same seeds: step n // prompts, place n % prompts.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import httpx

from pacenote.trainer.episode import Episode, oldest_version, play_episode
from pacenote.trainer.errors import EngineDied
from pacenote.trainer.game import Game
from pacenote.trainer.position import START, Group, Position
from pacenote.trainer.rollout_config import RolloutConfig
from pacenote.trainer.tasks import Task
from pacenote.trainer.watch import Watch

T = TypeVar("T")
Refusal = Literal["zero_std", "failed", "unrewarded", "stale"]
REFUSALS: tuple[Refusal, ...] = get_args(Refusal)


@dataclass(frozen=True, slots=True)
class Taken:
    """A step's groups in the order of the stream, and how many others were refused, by reason."""

    groups: tuple[Group, ...]
    refused: dict[Refusal, int]

    @property
    def episodes(self) -> list[Episode]:
        """Side by side, a group's after the other's."""
        return [episode for group in self.groups for episode in group.episodes]


@dataclass(slots=True)
class _Step:
    """What a step has so far."""

    accepted: list[Group] = field(default_factory=list)
    refused: Counter[Refusal] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)
    failure: str = ""
    begun: int = 0


@dataclass(slots=True)
class _State:
    """What the thread holds: numbers to begin, groups at play, groups that are done."""

    next: int
    again: list[int]
    ready: dict[int, Group]
    running: dict[int, asyncio.Task[Group]] = field(default_factory=dict)


class Rollouts:
    """Plays groups, and hands them over. A context manager; `take`, `break_off` and `position` are for one thread."""

    def __init__(
        self, game: Game, config: RolloutConfig, *, sessions: str, seed: int, position: Position = START
    ) -> None:
        """Nothing is played before the first `take`.

        Args:
            game: tasks, environment and reward.
            config: how many, how far ahead, what is refused.
            sessions: URL of the session server.
            seed: of tasks and samplers.
            position: where to go on in the stream.
        """
        self._tasks = lru_cache(maxsize=8)(lambda step: game.tasks(seed=seed, step=step, count=config.prompts))
        self.game, self.config, self.sessions, self.seed = game, config, sessions, seed
        ready = {group.number: group for group in position.ready}
        self._state = _State(position.next, list(position.again), ready)
        self._watch = Watch()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._gate = asyncio.Semaphore(config.concurrency)
        # httpx searches its idle connections for every request: beyond a few dozen that costs more than a new one.
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(timeout=config.request_timeout, limits=limits, trust_env=False)
        self._closing = False

    def task(self, number: int) -> Task:
        """The task of a group."""
        step, place = divmod(number, self.config.prompts)
        return self._tasks(step)[place]

    def take(self, newest: int, watch: Watch) -> Taken:
        """A step's groups, `config.prompts` of them; fewer where too many were refused.

        Args:
            newest: version of the weights that are served.
            watch: what ends the waiting early, by raising.

        Raises:
            EngineDied: no group came back, or none for too long.
            TaskFailed: an environment or a reward raised.
        """
        waiting = self._call(self._take(newest))
        try:
            watch.progress = time.monotonic()
            while not waiting.done():
                watch.progress = max(watch.progress, self._watch.progress)
                watch.look(self.config.patience)
                concurrent.futures.wait([waiting], timeout=watch.period)
            return waiting.result()
        except BaseException:
            waiting.cancel()
            self.break_off()
            raise

    def break_off(self) -> None:
        """Abort all that is at play; those groups are played again, first of all."""
        self._call(self._abort()).result()

    @property
    def position(self) -> Position:
        """Where the run would go on now: what is at play would be played again."""
        return self._call(self._position()).result()

    def __enter__(self) -> Rollouts:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort what is at play, and end the thread."""
        self._closing = True
        self.break_off()
        self._call(self._client.aclose()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _take(self, newest: int) -> Taken:
        state, step = self._state, _Step()
        try:
            await self._gather(step, newest)
        except BaseException:  # nothing of the step is lost: what came back waits, what failed is played again
            state.ready |= {group.number: group for group in step.accepted}
            state.again = sorted([*state.again, *step.failed])
            raise
        if self.config.ahead:
            self._fill()
        else:
            await self._abort()
            if not self.config.max_staleness:  # too old for the next step
                state.again = sorted([*state.again, *state.ready])
                state.ready.clear()
        groups = sorted(step.accepted, key=lambda group: group.number)
        return Taken(tuple(groups), {reason: step.refused[reason] for reason in REFUSALS})

    async def _gather(self, step: _Step, newest: int) -> None:
        """Play and sort until the step has its groups, or too many were refused."""
        state, config = self._state, self.config
        allowed = config.max_tries * config.prompts
        while True:
            self._sort(step, newest)
            missing = config.prompts - len(step.accepted)
            if not missing:
                return
            if config.ahead:
                if step.refused.total() >= allowed:
                    return
                self._fill()
            elif config.oversample or not state.running:
                most = math.ceil(missing * (1 + config.oversample)) - len(state.running)
                more = max(0, min(most, allowed - step.begun))
                step.begun += more
                self._begin(more)
            if not state.running:
                return
            # Without a share to spare all are waited for: which come first would be chance.
            until = asyncio.FIRST_COMPLETED if config.ahead or config.oversample else asyncio.ALL_COMPLETED
            await asyncio.wait(list(state.running.values()), return_when=until)
            self._collect()

    def _sort(self, step: _Step, newest: int) -> None:
        """What is ready: accepted, in the order of the stream, or refused.

        Raises:
            EngineDied: everything that came back has failed.
        """
        for number in sorted(self._state.ready):
            if len(step.accepted) == self.config.prompts:
                return
            group = self._state.ready.pop(number)
            reason = self._reason(group, newest)
            if reason is None:
                step.accepted.append(group)
                continue
            step.refused[reason] += 1
            if reason == "failed":
                step.failed.append(number)
                step.failure = step.failure or group.episodes[0].error or ""
        if len(step.failed) >= self.config.prompts and not step.accepted:
            raise EngineDied(
                f"no episode of {len(step.failed)} groups came back; the first failed with: {step.failure}"
            )

    def _reason(self, group: Group, newest: int) -> Refusal | None:
        """Why a group is not trained on."""
        if all(episode.error for episode in group.episodes):
            return "failed"
        kept = self.config.ahead or self.config.max_staleness
        if kept and oldest_version(group.episodes, newest) < newest - self.config.max_staleness:
            return "stale"
        if self.config.dynamic_sampling:
            rewards = {episode.reward for episode in group.episodes if episode.reward is not None}
            if len(rewards) < 2:
                return "zero_std" if rewards else "unrewarded"
        return None

    def _fill(self) -> None:
        """Begin as many groups as may be in the making."""
        state = self._state
        room = self.config.prompts * self.config.ahead - len(state.running) - len(state.ready)
        if not self._closing:
            self._begin(room)

    def _begin(self, count: int) -> None:
        for _ in range(count):
            state = self._state
            if state.again:
                number = state.again.pop(0)
            else:
                number, state.next = state.next, state.next + 1
            state.running[number] = task = asyncio.create_task(self._play(number))
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Group]) -> None:
        """Ahead, the next begins when one is over, whether the trainer waits or not."""
        if self.config.ahead and not task.cancelled() and task.exception() is None:
            self._collect()
            self._fill()

    def _collect(self) -> None:
        """Move what is over to what is ready.

        Raises:
            TaskFailed: what a group raised; it is played again.
        """
        state = self._state
        for number, task in [(n, t) for n, t in state.running.items() if t.done()]:
            del state.running[number]
            if task.cancelled() or task.exception() is not None:
                state.again = sorted([*state.again, number])
            if not task.cancelled():
                state.ready[number] = task.result()

    async def _abort(self) -> None:
        state = self._state
        tasks = list(state.running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for number, task in list(state.running.items()):
            if not task.cancelled() and task.exception() is None:
                state.ready[number] = task.result()  # it was over before it could be broken off
            else:
                state.again.append(number)
        state.again.sort()
        state.running.clear()

    async def _position(self) -> Position:
        state = self._state
        again = tuple(sorted([*state.again, *state.running]))
        return Position(state.next, again, tuple(state.ready[number] for number in sorted(state.ready)))

    async def _play(self, number: int) -> Group:
        config, game, task = self.config, self.game, self.task(number)
        step, place = divmod(number, config.prompts)
        seeds = [
            (self.seed * 1_000_003 + step) * 1_000_003 + place * config.group + member for member in range(config.group)
        ]

        async def one(seed: int) -> Episode:
            async with self._gate:
                episode = await play_episode(
                    self._client, self.sessions, task, game.environment, game.reward, config, seed
                )
            if episode.error is None:
                self._watch.progress = time.monotonic()
            return episode

        players = [asyncio.create_task(one(seed)) for seed in seeds]
        try:
            return Group(number, tuple(await asyncio.gather(*players)))
        finally:
            for player in players:
                player.cancel()
            await asyncio.gather(*players, return_exceptions=True)
