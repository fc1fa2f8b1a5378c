"""Play a step's episodes against the session server and bring their trajectories home."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from pacenote.rollout.samples import decode_samples
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer.errors import EngineDied, StaleWeights, TaskFailed
from pacenote.trainer.tasks import Chat, Environment, Message, Reward, Task, score


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How answers are sampled."""

    upstream: str | None = None
    """SGLang-compatible engine or gateway to use; none starts the embedded engine on this machine."""
    engines: tuple[str, ...] = ()
    """URLs of the engines behind `upstream` that get the weights; none: `upstream` itself."""
    max_staleness: int = 0
    """Weight versions that a trained token may be older than the newest; samples with older ones are left out."""
    prompts: int = 16
    """Prompts a step."""
    group: int = 8
    """Answers a prompt; the group's mean reward is each answer's baseline."""
    max_tokens: int = 3
    """Longest answer of one turn, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the trainer's logprobs use the same."""
    concurrency: int = 128
    """Episodes in flight at once."""
    request_timeout: float = 120.0
    """Seconds an answer may take."""
    patience: float = 600.0
    """Seconds without a finished episode after which the engine counts as stuck; one of ours is killed and started
    again."""
    restarts: int = 3
    """How often a dead or stuck engine is started again before the run stops."""
    engine_dtype: str = "bfloat16"
    """Number format of the embedded engine."""
    engine_device: str = "auto"
    """Torch device of the embedded engine; auto: the trainer's."""
    engine_port: int = 0
    """Port of the embedded engine; 0 picks a free one."""
    session_port: int = 0
    """Port of the session server; 0 picks a free one."""
    engine_threads: int = 1
    """CPU threads of the embedded engine."""
    append_roles: tuple[str, ...] = ("tool", "user")
    """Roles an environment may append to a conversation."""
    enable_thinking: bool = False
    """Whether the chat template opens a thinking block before each answer."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One conversation: its task, what was said, what it earned (None: nothing countable), the exact record."""

    task: Task
    messages: list[Message]
    reward: float | None
    trajectories: list[Trajectory]
    error: str | None = None


@dataclass(slots=True)
class Watch:
    """Conditions under which waiting for answers makes no sense any more; checked a few times a second."""

    checks: list[Callable[[], None]] = field(default_factory=list)
    period: float = 0.2
    progress: float = 0.0
    """When an episode last came back whole, by the monotonic clock."""

    async def run(self, patience: float = math.inf) -> None:
        """Raise whatever a check raises, or EngineDied once nothing has come for `patience` seconds."""
        self.progress = time.monotonic()
        while True:
            for check in self.checks:
                check()
            if time.monotonic() - self.progress > patience:
                raise EngineDied(f"no episode ended for {patience:g} s (--rollout.patience): the engine is stuck")
            await asyncio.sleep(self.period)


def collect(
    tasks: list[Task],
    environment: Environment,
    reward: Reward,
    *,
    sessions: str,
    config: RolloutConfig,
    seed: int,
    watch: Watch,
) -> list[Episode]:
    """Play each task `config.group` times; episodes stand in task order, a group's side by side.

    Args:
        sessions: URL of the session server.
        seed: seed of the sampler; each request draws its own from it.
        watch: what ends the waiting early, by raising.

    Raises:
        EngineDied: every episode failed, with the first reason; or none came back for too long.
        TaskFailed: the environment or the reward raised.
    """
    return asyncio.run(_collect(tasks, environment, reward, sessions, config, seed, watch))


async def _collect(
    tasks: list[Task],
    environment: Environment,
    reward: Reward,
    sessions: str,
    config: RolloutConfig,
    seed: int,
    watch: Watch,
) -> list[Episode]:
    gate = asyncio.Semaphore(config.concurrency)
    # httpx searches its idle connections for every request: beyond a few dozen that costs more than a new connection.
    limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=config.request_timeout, limits=limits, trust_env=False) as client:

        async def one(task: Task, number: int) -> Episode:
            async with gate:
                episode = await _episode(client, sessions, task, environment, reward, config, seed * 1_000_003 + number)
            if episode.error is None:
                watch.progress = time.monotonic()
            return episode

        watcher = asyncio.create_task(watch.run(config.patience))
        players = [asyncio.create_task(one(task, i)) for i, task in enumerate(_repeated(tasks, config.group))]
        everyone = asyncio.gather(*players)
        try:
            waiting: list[asyncio.Future[Any]] = [watcher, everyone]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done():
                watcher.result()
            episodes = list(await everyone)
        finally:
            for task_ in (watcher, *players):
                task_.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.gather(watcher, everyone, return_exceptions=True)
    failed = [episode.error for episode in episodes if episode.error]
    if len(failed) == len(episodes):
        raise EngineDied(f"no episode of {len(episodes)} came back; the first failure was: {failed[0]}")
    return episodes


def _repeated(tasks: list[Task], times: int) -> Iterator[Task]:
    for task in tasks:
        for _ in range(times):
            yield task


async def _episode(
    client: httpx.AsyncClient,
    sessions: str,
    task: Task,
    environment: Environment,
    reward: Reward,
    config: RolloutConfig,
    seed: int,
) -> Episode:
    """Open a session, play, score, fetch the samples, close; transport failures become an Episode's error."""
    defaults: dict[str, Any] = {
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "chat_template_kwargs": {"enable_thinking": config.enable_thinking},
    }
    url = None
    try:
        opened = await client.post(f"{sessions}/sessions")
        opened.raise_for_status()
        url = f"{sessions}/sessions/{opened.json()['session_id']}"
        messages, worth = await _play(Chat(client, f"{url}/v1", defaults, seed), task, environment, reward)
        reply = await client.post(f"{url}/samples")
        reply.raise_for_status()
        return Episode(task, messages, worth, decode_samples(reply.content))
    except httpx.HTTPError as error:
        return Episode(task, task.messages, None, [], f"{type(error).__name__}: {error}")
    finally:
        if url is not None:
            with contextlib.suppress(httpx.HTTPError):
                await client.delete(url)


async def _play(chat: Chat, task: Task, environment: Environment, reward: Reward) -> tuple[list[Message], float | None]:
    """Conversation and worth; somebody's environment or reward may raise anything, most often a transport's error."""
    try:
        messages = await environment(chat, task)
        return messages, await score(reward, messages, task.label)
    except Exception as error:
        link: BaseException | None = error
        while link is not None:  # clients wrap the transport's error in one of their own
            if isinstance(link, httpx.HTTPError):
                raise link from None
            link = link.__cause__ or link.__context__
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise TaskFailed(
            f"environment or reward raised {type(error).__name__}: {error} "
            f"({Path(place.filename).name}, line {place.lineno}: {place.line})"
        ) from error


def check_versions(episodes: list[Episode], newest: int, *, bound: int = 0) -> tuple[list[Episode], int]:
    """Leave out samples with a trained token of weights older than `bound` versions; prove the age of the others.

    Args:
        newest: version that the engines were given last.
        bound: versions that a token may be older.

    Returns:
        The episodes, and the number of samples left out.

    Raises:
        StaleWeights: of bound 0, a version that is not the newest; else one that nobody has given, or none.
    """
    kept, dropped, seen = [], 0, set[int]()
    for episode in episodes:
        fresh = []
        for trajectory in episode.trajectories:
            versions = set(trajectory.version[trajectory.loss_mask.astype(bool)].tolist())
            seen |= versions
            if min(versions, default=newest) >= newest - bound:
                fresh.append(trajectory)
        dropped += len(episode.trajectories) - len(fresh)
        kept.append(episode if len(fresh) == len(episode.trajectories) else replace(episode, trajectories=fresh))
    allowed = {newest} if not bound else set(range(newest + 1))
    if seen - allowed:
        raise StaleWeights(
            f"expected every answer from weight version {newest}{f' or up to {bound} before' if bound else ''}, got "
            f"versions {sorted(seen)}: an engine did not take the last update, or several engines serve different "
            "weights"
        )
    return kept, dropped
