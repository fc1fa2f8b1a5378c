"""New weights to every engine: sent, confirmed by asking each one back, and no engine left to serve old ones as new.

    pause -> begin -> send -> end -> what do you serve? -> continue

An engine that failed stays paused and is named in the error, with the version that it serves. What each pause does to
requests that run: docs/operations.md. Protocol: srt/entrypoints/http_server.py of SGLang 0.5.23.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing
from torch import Tensor

from pacenote.rollout.embedded_weights import weight_group
from pacenote.rollout.launch import free_port
from pacenote.trainer.engines import Engine, Pause, each
from pacenote.trainer.errors import EngineDied, StaleWeights

KEEP = 2  # an engine may be restarted from the last version while the next is being written
GROUP = "pacenote"
Named = tuple[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """How new weights reach the engines."""

    method: Literal["disk", "tensor", "distributed"] = "disk"
    """disk: a model directory that engines can read, too. tensor: shared memory, of engines on this machine.
    distributed: broadcasts over a process group (NCCL from a GPU, else gloo)."""
    pause: Pause = "none"
    """What happens to requests that run. none: the update waits for them. abort: they end. retract: they are computed
    anew under the new weights. in_place: they go on from their old keys and values (the cache is not flushed)."""
    bucket_mb: int = 512
    """MiB of tensors in one call."""
    timeout: float = 600.0
    """Seconds that one call, or one broadcast, may take."""
    address: str = "127.0.0.1"
    """Where engines find this process's group."""

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
        if self.bucket_mb < 1:
            raise ValueError(f"expected --sync.bucket-mb of at least 1, got {self.bucket_mb}")
        if not self.timeout > 0:
            raise ValueError(f"expected --sync.timeout above 0 seconds, got {self.timeout}")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a version, in whatever form they are asked for.

    Attributes:
        path: where they stand, or will.
        save: writes them there.
        tensors: gives them under the names that they have on disk.
    """

    path: Path
    save: Callable[[Path], None]
    tensors: Callable[[], Iterator[Named]]

    def on_disk(self) -> Path:
        """The model directory; written if it is not there, and those of old versions removed."""
        if not self.path.exists():
            self.save(self.path)
            prune(self.path.parent, int(self.path.name))
        return self.path


class WeightSync:
    """Keeps the process group, if there is one, between pushes.

    Args:
        urls: of the engines, each one itself and no gateway.
        config: how.
    """

    def __init__(self, urls: Sequence[str], config: SyncConfig) -> None:
        self.urls, self.config = tuple(urls), config
        self._group: torch.distributed.ProcessGroup | None = None

    def push(self, weights: Weights, version: int) -> None:
        """Have all engines serve `weights` as `version`, and confirm that they do.

        Raises:
            EngineDied: one did not answer.
            StaleWeights: one refused them, or serves another version afterwards. Both name every engine; those that
                serve the version go on, the others stay paused (if `pause` is not "none").
        """
        engines = [Engine(url, timeout=self.config.timeout) for url in self.urls]
        try:
            self._pause(engines)
            send = {"disk": self._from_disk, "tensor": self._tensors, "distributed": self._broadcast}
            send[self.config.method](engines, weights, str(version))
            each(engines, lambda engine: engine.verify(str(version)))
            if self.config.pause != "none":
                each(engines, lambda engine: engine.post("continue_generation", {}))
            if any(engine.error for engine in engines):
                raise _failure(engines, version)
        finally:
            for engine in engines:
                engine.close()

    def forget(self) -> None:
        """The process group is broken, or an engine of it was started again: make another one next time."""
        self._group = None

    def _pause(self, engines: Sequence[Engine]) -> None:
        mode = self.config.pause
        if mode != "none":
            each(engines, lambda engine: engine.post("pause_generation", {"mode": mode}))

    @property
    def _flush(self) -> bool:
        """Whether the cache goes: requests that are paused in place hold it."""
        return self.config.pause != "in_place"

    def _from_disk(self, engines: Sequence[Engine], weights: Weights, version: str) -> None:
        body = {"model_path": str(weights.on_disk()), "weight_version": version, "flush_cache": self._flush}
        each(engines, lambda engine: engine.post("update_weights_from_disk", body))

    def _tensors(self, engines: Sequence[Engine], weights: Weights, version: str) -> None:
        each(engines, lambda engine: engine.post("begin_weight_update", {}))
        ranks = dict(zip(self.urls, each(engines, Engine.ranks), strict=True))
        for bucket in buckets(weights.tensors(), self.config.bucket_mb << 20):
            held = [(name, tensor.detach().to("cpu", copy=True).contiguous()) for name, tensor in bucket]
            payload = shared(held)  # which has to be kept until everybody has read it

            def send(engine: Engine, payload: str = payload) -> None:
                body = {
                    "serialized_named_tensors": [payload] * ranks.get(engine.url, 1),
                    "weight_version": version,
                    "flush_cache": self._flush,
                }
                engine.post("update_weights_from_tensor", body)

            each(engines, send)
        each(engines, lambda engine: engine.post("end_weight_update", {}))

    def _broadcast(self, engines: Sequence[Engine], weights: Weights, version: str) -> None:
        group = self._joined(engines)
        if group is None:
            return
        each(engines, lambda engine: engine.post("begin_weight_update", {}))
        for bucket in buckets(weights.tensors(), self.config.bucket_mb << 20):
            body = {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": GROUP,
                "weight_version": version,
                "flush_cache": self._flush,
            }
            if any(engine.error for engine in engines):
                break  # whoever is left would wait for a group that is no longer whole
            with ThreadPoolExecutor(1) as beside:
                told = beside.submit(each, engines, partial(_tell, body=body))
                try:
                    for _, tensor in bucket:
                        group.broadcast(tensor.detach().contiguous(), 0).wait()
                except RuntimeError as error:
                    for engine in engines:
                        engine.error = engine.error or f"the broadcast broke: {error}"
                told.result()
        if any(engine.error for engine in engines):
            self.forget()
            each(engines, lambda engine: engine.post("destroy_weights_update_group", {"group_name": GROUP}))
        each(engines, lambda engine: engine.post("end_weight_update", {}))

    def _joined(self, engines: Sequence[Engine]) -> torch.distributed.ProcessGroup | None:
        """The group, made if there is none; None if an engine did not come."""
        if self._group is not None:
            return self._group
        ranks = each(engines, Engine.ranks)
        first = [1 + sum(ranks[:place]) for place in range(len(ranks))]
        backend, port, size = ("nccl" if torch.cuda.is_available() else "gloo"), free_port(), 1 + sum(ranks)

        def join(place: int) -> None:
            engines[place].post("destroy_weights_update_group", {"group_name": GROUP})
            engines[place].error = None  # mostly there was none to leave
            body = {
                "master_address": self.config.address,
                "master_port": port,
                "rank_offset": first[place],
                "world_size": size,
                "group_name": GROUP,
                "backend": backend,
            }
            engines[place].post("init_weights_update_group", body)

        with ThreadPoolExecutor(len(engines)) as beside:
            joining = [beside.submit(join, place) for place in range(len(engines))]
            try:
                self._group = weight_group(
                    self.config.address, port, rank=0, size=size, name=GROUP, backend=backend,
                    timeout=min(120.0, self.config.timeout),
                )  # fmt: skip
            except RuntimeError as error:
                for engine in engines:
                    engine.error = engine.error or f"the process group was not made: {error}"
            for future in joining:
                future.result()
        return self._group


def _tell(engine: Engine, body: dict[str, Any]) -> None:
    engine.post("update_weights_from_distributed", body)


def _failure(engines: Sequence[Engine], version: int) -> EngineDied | StaleWeights:
    words = [
        f"{engine.url} serves {'nobody knows what' if engine.version is None else engine.version}"
        + (f" ({engine.error})" if engine.error else "")
        for engine in engines
    ]
    kind = EngineDied if any(engine.lost for engine in engines) else StaleWeights
    return kind(f"the engines should all serve weight version {version}: {'; '.join(words)}")


def buckets(tensors: Iterator[Named], size: int) -> Iterator[list[Named]]:
    """Tensors in order, together at most `size` bytes; one that is larger stands alone."""
    bucket: list[Named] = []
    held = 0
    for name, tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if bucket and held + own > size:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += own
    if bucket:
        yield bucket


def shared(tensors: Sequence[Named]) -> str:
    """base64 of a pickle that names shared memory, as SGLang's MultiprocessingSerializer writes and reads it."""
    share: Any = torch.multiprocessing
    before = share.get_sharing_strategy()
    share.set_sharing_strategy("file_system")  # a file descriptor does not travel over HTTP
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(list(tensors))
        return base64.b64encode(buffer.getvalue()).decode()
    finally:
        share.set_sharing_strategy(before)


def weights_path(root: Path, version: int) -> Path:
    """Where the weights of a version stand."""
    return root / f"{version:06d}"


def prune(root: Path, version: int) -> None:
    """Remove weight directories older than the last KEEP versions."""
    for path in root.iterdir():
        if path.name.isdigit() and int(path.name) <= version - KEEP:
            shutil.rmtree(path, ignore_errors=True)
