"""The processes of a run: one, or as many as torchrun started. The first one leads: it rolls out, writes and decides.

What the leader finds out reaches the others whole or not at all: `lead` gives all of them its result, or raises its
error in all of them, so that nobody waits for a rank that has left.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # others wait for the leader's whole rollout; a rank that dies ends all by torchrun


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank is in the back end's layout.

    Attributes:
        data_rank: which share of a step's samples it trains on.
        data_size: into how many shares they are cut.
        speaks: whether its numbers count: one rank for each share does.
        multiple: microbatches of an optimizer step come in multiples of this.
    """

    data_rank: int = 0
    data_size: int = 1
    speaks: bool = True
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: its number.
        size: how many there are.
        control: gloo group for Python objects; None for one process alone.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    @classmethod
    def join(cls, environment: Mapping[str, str], device: str) -> World:
        """Meet the other processes that torchrun started; alone where it started none.

        Args:
            environment: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
            device: what this rank trains on, cpu or cuda:N; gives the collectives' library.
        """
        size = int(environment.get("WORLD_SIZE", "1"))
        if "RANK" not in environment or not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if device.startswith("cuda"):
                torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        world = cls(rank=int(environment["RANK"]), size=size, control=control)
        if not world.leads:  # Ctrl-C reaches all of them; the leader says when to stop
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return world

    def __enter__(self) -> World:
        """The world itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Part from the others."""
        if self.control is not None and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process rolls out, writes and decides."""
        return self.rank == 0

    def lead(self, call: Callable[[], T]) -> T:
        """The leader's result of `call`, in every process.

        Raises:
            BaseException: what the call raised, in every process.
        """
        found = self.alone(call)
        if self.size == 1:
            return found  # type: ignore[return-value]
        said = [found]
        dist.broadcast_object_list(said, group=self.control)
        return said[0]  # type: ignore[return-value]

    def alone(self, call: Callable[[], T]) -> T | None:
        """The leader's result of `call`, which it keeps to itself: None in the others.

        Raises:
            BaseException: what the call raised, in every process.
        """
        if self.size == 1:
            return call()
        found: T | None = None
        said: list[BaseException | None] = [None]
        if self.leads:
            try:
                found = call()
            except BaseException as error:  # the others must not wait for ever
                dist.broadcast_object_list([error], group=self.control)
                raise
        dist.broadcast_object_list(said, group=self.control)
        if said[0] is not None:
            raise said[0]
        return found

    def scatter(self, parts: Sequence[T] | None) -> T:
        """This process's part of the leader's [size] parts."""
        if self.size == 1:
            assert parts is not None
            return parts[0]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, list(parts) if parts is not None else None, group=self.control)
        found: T = mine[0]
        return found

    def gather(self, value: T) -> list[T]:
        """Every process's value, [size], in every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def spoken(self, value: T, place: Place) -> list[T]:
        """The values of those that speak, one for each share of the data, in every process."""
        return [said for said, counts in self.gather((value, place.speaks)) if counts]


def local_device(device: str, environment: Mapping[str, str]) -> str:
    """The device of this rank: under torchrun each process of a machine has a GPU of its own."""
    return f"cuda:{environment.get('LOCAL_RANK', '0')}" if device == "cuda" and "RANK" in environment else device


ALONE = World()
"""One process."""
