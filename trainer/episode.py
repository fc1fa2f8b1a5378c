"""One episode: a session opened, a conversation played and scored, and its exact record brought home."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from pacenote.rollout.samples import decode_samples
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer.errors import StaleWeights, TaskFailed
from pacenote.trainer.rollout_config import RolloutConfig
from pacenote.trainer.tasks import Chat, Environment, Message, Reward, Task, Unrewarded, Worth, judge


@dataclass(frozen=True, slots=True)
class Episode:
    """One conversation: its task, what was said, what it earned (None: nothing countable, for a reason), the exact
    record; or the error that ended it."""

    task: Task
    messages: list[Message]
    reward: float | None
    trajectories: list[Trajectory]
    error: str | None = None
    reason: Unrewarded | None = None


async def play_episode(
    client: httpx.AsyncClient,
    sessions: str,
    task: Task,
    environment: Environment,
    reward: Reward,
    config: RolloutConfig,
    seed: int,
) -> Episode:
    """Open a session, play, score, fetch the samples, close.

    Args:
        client: speaks to the session server.
        sessions: its URL.
        task: what is asked.
        environment: who asks.
        reward: what it is worth.
        config: how answers are sampled.
        seed: of the episode's sampler.

    Returns:
        The episode; one that failed in transport, or took longer than `config.episode_timeout`, says so as its error.

    Raises:
        TaskFailed: the environment or the reward raised.
    """
    try:
        async with asyncio.timeout(config.episode_timeout):
            return await _episode(client, sessions, task, environment, reward, config, seed)
    except httpx.HTTPError as error:
        return Episode(task, task.messages, None, [], f"{type(error).__name__}: {error}")
    except TimeoutError:
        limit = f"{config.episode_timeout:g} s (--rollout.episode-timeout)"
        return Episode(task, task.messages, None, [], f"it took longer than {limit}")


async def _episode(
    client: httpx.AsyncClient,
    sessions: str,
    task: Task,
    environment: Environment,
    reward: Reward,
    config: RolloutConfig,
    seed: int,
) -> Episode:
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
        messages, worth = await _play(
            Chat(client, f"{url}/v1", defaults, seed), task, environment, reward, config.reward_timeout
        )
        reply = await client.post(f"{url}/samples")
        reply.raise_for_status()
        return Episode(task, messages, worth.value, decode_samples(reply.content), reason=worth.reason)
    finally:
        if url is not None:
            with contextlib.suppress(httpx.HTTPError):
                await client.delete(url)


async def _play(
    chat: Chat, task: Task, environment: Environment, reward: Reward, timeout: float | None
) -> tuple[list[Message], Worth]:
    """Conversation and worth; somebody's environment or reward may raise anything, most often a transport's error."""
    try:
        messages = await environment(chat, task)
        return messages, await judge(reward, messages, task.label, timeout=timeout)
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


def oldest_version(episodes: Sequence[Episode], newest: int) -> int:
    """The oldest weights that a trained token of the episodes is of; `newest` where nothing is trained."""
    versions = [t.version[t.loss_mask.astype(bool)] for episode in episodes for t in episode.trajectories]
    return min((int(found.min()) for found in versions if len(found)), default=newest)


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
