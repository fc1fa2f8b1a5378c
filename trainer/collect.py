"""Play tasks against the session server, all at once, and wait for every one: what evaluations do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx

from pacenote.trainer.episode import Episode, play_episode
from pacenote.trainer.errors import EngineDied
from pacenote.trainer.rollout_config import RolloutConfig
from pacenote.trainer.tasks import Environment, Reward, Task
from pacenote.trainer.watch import Watch


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
                episode = await play_episode(
                    client, sessions, task, environment, reward, config, seed * 1_000_003 + number
                )
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
