"""New weights over HTTP, beside those from disk: SGLang's update session for the embedded engine.

    begin_weight_update, update_weights_from_tensor | update_weights_from_distributed ..., end_weight_update

What comes is kept aside until the end, which takes all of it or nothing; SGLang changes the model with every call and
leaves a half-changed one behind a failure. Tensors have the names that `save_pretrained` writes; a part will do.
Protocol: srt/managers/io_struct.py and srt/managers/scheduler_components/weight_updater.py of SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import pickle
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.multiprocessing import reductions

from pacenote.rollout.embedded_engine import UpdateResult
from pacenote.rollout.embedded_group import WeightGroup
from pacenote.rollout.embedded_protocol import DistributedBody, GroupBody, TensorBody

GROUP_SECONDS = 120.0
_NO_FORMAT = "load_format={!r} is not supported by the embedded engine: leave it out"
Named = tuple[str, torch.Tensor]
_SAFE = {
    ("torch.multiprocessing.reductions", name): getattr(reductions, name)
    for name in ("rebuild_tensor", "rebuild_storage_filename", "rebuild_storage_empty", "rebuild_typed_storage")
}
"""Beside torch's dtypes and Size, all that a shared tensor needs; nothing that runs somebody's code."""


class Taker(Protocol):
    """What takes new weights: `embedded_engine.Engine`."""

    def update_tensors(
        self, tensors: Sequence[Named], *, version: str | None, flush: bool, abort_all: bool = False
    ) -> Future[UpdateResult]:
        """See `embedded_engine.Engine.update_tensors`."""
        ...


@dataclass(slots=True)
class _Session:
    tensors: list[Named] = field(default_factory=list)
    version: str | None = None
    flush: bool = False
    abort: bool = False
    broken: str | None = None

    def add(self, tensors: Sequence[Named], body: TensorBody | DistributedBody) -> None:
        self.tensors += tensors
        self.version = body.weight_version if body.weight_version is not None else self.version
        self.flush, self.abort = self.flush or body.flush_cache, self.abort or body.abort_all_requests

    def fail(self, message: str) -> UpdateResult:
        self.broken = self.broken or message
        return _no(message)


class WeightUpdates:
    """The session of one engine, and the process groups that it is in.

    Args:
        engine: takes the weights.
    """

    def __init__(self, engine: Taker) -> None:
        self._engine = engine
        self._session: _Session | None = None
        self._groups: dict[str, WeightGroup] = {}

    def begin(self) -> UpdateResult:
        """POST /begin_weight_update."""
        if self._session is not None:
            return _no("a weight-update session is already open; call end_weight_update() first")
        self._session = _Session()
        return _yes("Success")

    async def end(self) -> UpdateResult:
        """POST /end_weight_update: the weights serve once this returns."""
        if self._session is None:
            return _no("no weight-update session is open; call begin_weight_update() first")
        session, self._session = self._session, None
        if session.broken is not None:
            return _no(f"the weights did not come whole, so none of them were taken: {session.broken}")
        if not session.tensors:
            return _yes("Success")
        result = await asyncio.wrap_future(
            self._engine.update_tensors(
                session.tensors, version=session.version, flush=session.flush, abort_all=session.abort
            )
        )
        return _yes("Success") if result.success else result

    async def tensors(self, body: TensorBody) -> UpdateResult:
        """POST /update_weights_from_tensor: shared memory of a process on this machine."""
        session = self._session
        if session is None:
            return _no("update_weights_from_tensor must run between begin_weight_update() and end_weight_update()")
        if body.load_format is not None:
            return session.fail(
                f"load_format={body.load_format!r} is not supported by the embedded engine: leave it out"
            )
        if len(body.serialized_named_tensors) != 1:
            return session.fail(f"expected tensors for 1 rank, got {len(body.serialized_named_tensors)}")
        try:
            found = await asyncio.to_thread(read_tensors, body.serialized_named_tensors[0])
        except ValueError as error:
            return session.fail(str(error))
        session.add(found, body)
        return _yes("Success")

    async def distributed(self, body: DistributedBody) -> UpdateResult:
        """POST /update_weights_from_distributed: broadcasts of rank 0 of the group, one a tensor, in order."""
        session = self._session
        if session is None:
            return _no("update_weights_from_distributed must run between begin_weight_update() and end_weight_update()")
        group = self._groups.get(body.group_name)
        if group is None:
            return session.fail(f"no group {body.group_name!r}: call init_weights_update_group() first")
        if body.load_format is not None:
            return session.fail(
                f"load_format={body.load_format!r} is not supported by the embedded engine: leave it out"
            )
        try:
            found = await asyncio.to_thread(_receive, group, body)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            return session.fail(f"Failed to receive weights: {error}")
        session.add(found, body)
        return _yes("Succeeded to update parameter online.")

    async def join(self, body: GroupBody) -> UpdateResult:
        """POST /init_weights_update_group: waits for all of the group."""
        if body.group_name in self._groups:
            return _no(f"the group {body.group_name!r} is there already: call destroy_weights_update_group() first")
        try:
            self._groups[body.group_name] = await asyncio.to_thread(
                WeightGroup, body.master_address, body.master_port, rank=body.rank_offset, size=body.world_size,
                name=body.group_name, backend=body.backend, timeout=GROUP_SECONDS,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            return _no(f"Failed to initialize custom process group: {error}.")
        return _yes("Succeeded to initialize custom process group.")

    async def leave(self, name: str) -> UpdateResult:
        """POST /destroy_weights_update_group."""
        group = self._groups.pop(name, None)
        if group is None:
            return _no("The group to be destroyed does not exist.")
        await asyncio.to_thread(group.close)
        return _yes("Succeeded to destroy custom process group.")


def _yes(message: str) -> UpdateResult:
    return UpdateResult(success=True, message=message)


def _no(message: str) -> UpdateResult:
    return UpdateResult(success=False, message=message)


class _Reader(pickle.Unpickler):
    """Reads what ForkingPickler writes of [(name, tensor)], and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found: Any = _SAFE.get((module, name))
        if found is not None:
            return found
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype) or value in (torch.Size, torch.Tensor):
            return value
        if (module, name) in (("torch.storage", "UntypedStorage"), ("torch.nn.parameter", "Parameter")):
            return torch.UntypedStorage if name == "UntypedStorage" else torch.nn.Parameter
        raise pickle.UnpicklingError(f"{module}.{name} has no place among tensors")


def read_tensors(payload: str) -> list[Named]:
    """Tensors of a base64 pickle, from shared memory of this machine, copied.

    Raises:
        ValueError: not such a pickle, or memory that is not there (the sender has to keep it until it has an answer).
    """
    try:
        found = _Reader(io.BytesIO(base64.b64decode(payload, validate=True))).load()
        if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found):
            raise ValueError("other things than (name, tensor)")
        return [(name, value.detach().clone()) for name, value in found]
    except (binascii.Error, pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"expected serialized_named_tensors as a list of (name, tensor), got {error!r}") from error


def _receive(group: WeightGroup, body: DistributedBody) -> list[Named]:
    device = torch.device("cuda" if group.backend == "nccl" else "cpu")
    found: list[Named] = []
    for name, dtype, shape in zip(body.names, body.dtypes, body.shapes, strict=True):
        kind = getattr(torch, dtype)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"no dtype {dtype!r}")
        found.append((name, torch.empty(shape, dtype=kind, device=device)))
    for work in [group.broadcast(tensor) for _, tensor in found]:
        work.wait()
    return found
