"""Where a run is in the endless stream of groups, and how that is kept in a checkpoint.

`stream.json` has the numbers, and of each group that is played and not yet trained on what was said and earned;
`ready_N.safetensors` the exact record of group N's episodes, as the session server sends it. Tasks follow from numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacenote.rollout.samples import decode_samples, encode_samples
from pacenote.trainer.episode import Episode
from pacenote.trainer.tasks import Task

FILE = "stream.json"


@dataclass(frozen=True, slots=True)
class Group:
    """The episodes of one task: number `number` of the stream."""

    number: int
    episodes: tuple[Episode, ...]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run is in the stream.

    Attributes:
        next: the first group that was never begun.
        again: groups that were begun and have to be played again, in order.
        ready: groups that are played and were not trained on.
    """

    next: int = 0
    again: tuple[int, ...] = ()
    ready: tuple[Group, ...] = ()


START = Position()
"""Of a new run."""


def save_position(folder: Path, position: Position) -> None:
    """Write it into a checkpoint's folder.

    Raises:
        OSError: there is no space.
    """
    ready = []
    for group in position.ready:
        trajectories = [trajectory for episode in group.episodes for trajectory in episode.trajectories]
        (folder / f"ready_{group.number}.safetensors").write_bytes(encode_samples(trajectories))
        ready.append({"number": group.number, "episodes": [_noted(episode) for episode in group.episodes]})
    text = json.dumps({"next": position.next, "again": position.again, "ready": ready}, default=str)
    (folder / FILE).write_text(text, encoding="utf-8")


def _noted(episode: Episode) -> dict[str, Any]:
    return {
        "messages": episode.messages,
        "reward": episode.reward,
        "trajectories": len(episode.trajectories),
        "error": episode.error,
        "reason": episode.reason,
    }


def load_position(folder: Path, task: Callable[[int], Task]) -> Position:
    """Read it back.

    Args:
        folder: of a checkpoint.
        task: of the group of a number.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        said = json.loads((folder / FILE).read_text(encoding="utf-8"))
        ready = tuple(_group(folder, group, task(group["number"])) for group in said["ready"])
        return Position(int(said["next"]), tuple(said["again"]), ready)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / FILE} cannot be read ({type(error).__name__}: {error}): delete {folder} to resume from the "
            "checkpoint before"
        ) from error


def _group(folder: Path, said: dict[str, Any], task: Task) -> Group:
    trajectories = iter(decode_samples((folder / f"ready_{said['number']}.safetensors").read_bytes()))
    episodes = [
        Episode(
            task,
            note["messages"],
            note["reward"],
            [next(trajectories) for _ in range(note["trajectories"])],
            note["error"],
            note["reason"],
        )
        for note in said["episodes"]
    ]
    return Group(said["number"], tuple(episodes))
