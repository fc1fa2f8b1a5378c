"""New weights to every engine: sent, confirmed by asking each one back, and no engine left to serve old ones as new.

    pause -> flush the cache -> begin -> buckets -> end -> what do you serve? -> continue

The version comes with the last bucket, so that an engine that got only some calls itself by the old one. `end` is what
makes SGLang finish weights that it keeps in another form than they come in (quantised, repacked). An engine that failed
is paused, stays so, and is named in the error with the version that it says it serves. What each pause does to requests
that run: docs/operations.md. Protocol: srt/entrypoints/http_server.py of SGLang 0.5.23.
"""

from __future__ import annotations

import base64
import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.multiprocessing
from safetensors import safe_open
from torch import Tensor

from pacenote.trainer.backend import Backend
from pacenote.trainer.engines import Engine, Pause, each
from pacenote.trainer.errors import EngineDied, StaleWeights
from pacenote.trainer.sync_group import Link

KEEP = 2  # an engine may be restarted from the last version while the next is being written
Item = TypeVar("Item")
Named = tuple[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """How new weights reach the engines."""

    method: Literal["disk", "tensor", "distributed"] = "disk"
    """disk: a model directory that engines can read, too. tensor: shared memory, of engines on this machine.
    distributed: broadcasts over a process group with each engine."""
    pause: Pause = "none"
    """What happens to requests that run. none (from disk only): the update waits for them. abort: they end. retract:
    they are computed anew under the new weights. in_place: they go on from their old keys and values, and the cache is
    not flushed."""
    bucket_mb: int = 512
    """MiB of tensors in one call."""
    timeout: float = 600.0
    """Seconds that one call, or one broadcast, may take."""
    address: str = "127.0.0.1"
    """Where engines find this process's group."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Of the process group; auto: nccl if the trainer's weights are on a GPU."""

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
        if self.bucket_mb < 1:
            raise ValueError(f"expected --sync.bucket-mb of at least 1, got {self.bucket_mb}")
        if not self.timeout > 0:
            raise ValueError(f"expected --sync.timeout above 0 seconds, got {self.timeout}")
        if self.pause == "none" and self.method != "disk":
            raise ValueError(
                f"--sync.method {self.method} expects --sync.pause abort, retract or in_place, got none: between two "
                "buckets an engine would answer with weights that are half old and half new"
            )


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


def published(path: Path, backend: Backend) -> Weights:
    """A back end's weights for the engines. Many ranks, of which each has a part, write them together and first."""
    world = backend.world
    if world.size > 1:
        if not world.lead(path.exists):
            backend.save_weights(path)
        if world.leads:
            prune(path.parent, int(path.name))
            return saved_weights(path)
    return Weights(path, backend.save_weights, backend.tensors)


def saved_weights(path: Path) -> Weights:
    """The weights in a model directory.

    Raises:
        ValueError: there are none (safetensors files, as `save_pretrained` writes them).
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"expected a model directory with safetensors files, got {path}")

    def tensors() -> Iterator[Named]:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    yield name, opened.get_tensor(name)

    def save(_: Path) -> None:
        raise FileNotFoundError(f"{path} is gone")

    return Weights(path, save, tensors)


def push(urls: Sequence[str], weights: Weights, version: int, config: SyncConfig) -> None:
    """Have all engines serve `weights` as `version`, and confirm that they do.

    Args:
        urls: of the engines, each one itself and no gateway.

    Raises:
        EngineDied: one did not answer.
        StaleWeights: one refused them, or serves another version afterwards. Both name every engine: those that serve
            the version go on, the others are paused until a later push reaches them.
    """
    engines = [Engine(url, timeout=config.timeout) for url in urls]
    send = {"disk": _from_disk, "tensor": _from_tensors, "distributed": _broadcast}[config.method]
    try:
        if config.method == "disk":
            weights.on_disk()  # before anybody stands still for it
        if config.pause != "none":
            each(engines, lambda engine: engine.post("pause_generation", {"mode": config.pause}))
        if config.pause in ("abort", "retract"):  # in place, requests hold the cache
            each(engines, lambda engine: engine.post("flush_cache", {}))
        send(engines, weights, str(version), config)
        each(engines, lambda engine: engine.verify(str(version)))
        # Whatever the pause: an earlier push may have failed here and left it paused, and now it serves what it should.
        each(engines, lambda engine: engine.post("continue_generation", {}))
        failed = [engine for engine in engines if engine.error is not None]
        if failed:
            # One that was not paused goes on with other weights than the rest; one that is keeps its own mode. Not in
            # place, where requests would hold the cache that the next push has to flush.
            if config.pause == "none":
                each(failed, lambda engine: engine.try_post("pause_generation", {"mode": "retract"}))
            raise _failure(engines, version)
    finally:
        for engine in engines:
            engine.close()


def _from_disk(engines: Sequence[Engine], weights: Weights, version: str, config: SyncConfig) -> None:
    flush = config.pause == "none"  # else it was, or cannot be
    body = {"model_path": str(weights.on_disk()), "weight_version": version, "flush_cache": flush}
    each(engines, lambda engine: engine.post("update_weights_from_disk", body))


def _from_tensors(engines: Sequence[Engine], weights: Weights, version: str, config: SyncConfig) -> None:
    ranks = dict(zip(engines, each(engines, Engine.ranks), strict=True))
    with _session(engines) as begun:
        for bucket, last in with_last(buckets(weights.tensors(), config.bucket_mb << 20)):
            held = [(name, tensor.detach().to("cpu", copy=True).contiguous()) for name, tensor in bucket]
            # Who reads a payload gives up one count of its memory, so each rank of each engine needs one of its own.
            payloads = {engine: [shared(held) for _ in range(ranks[engine])] for engine in begun}

            def send(engine: Engine, payloads: dict[Engine, list[str]] = payloads, last: bool = last) -> None:
                body = {"serialized_named_tensors": payloads[engine], **_rest(version, last)}
                engine.post("update_weights_from_tensor", body)

            each(begun, send)  # `held` lives until everybody has read it


def _broadcast(engines: Sequence[Engine], weights: Weights, version: str, config: SyncConfig) -> None:
    sent = buckets(weights.tensors(), config.bucket_mb << 20)
    first = next(sent, [])
    on_gpu = any(tensor.is_cuda for _, tensor in first)
    backend = config.backend if config.backend != "auto" else "nccl" if on_gpu else "gloo"
    links = each(engines, lambda engine: Link(engine, address=config.address, backend=backend, timeout=config.timeout))
    by_engine = {link.engine: link for link in links}
    try:
        with _session(engines) as begun:
            for bucket, last in with_last(itertools.chain([first] if first else [], sent)):

                def send(engine: Engine, bucket: list[Named] = bucket, last: bool = last) -> None:
                    by_engine[engine].send(bucket, _rest(version, last))

                each(begun, send)
    finally:
        for link in links:
            link.close()


def _rest(version: str, last: bool) -> dict[str, Any]:
    """What a call says beside its tensors. The cache was flushed, or cannot be."""
    return {"flush_cache": False, **({"weight_version": version} if last else {})}


@contextmanager
def _session(engines: Sequence[Engine]) -> Iterator[list[Engine]]:
    """The engines whose session is open. It is closed at the end, also if the trainer itself fails in between: the
    engines stay paused then, and the next push can begin."""
    opened = each(engines, lambda engine: engine.post("begin_weight_update", {}))
    begun = [engine for engine, is_open in zip(engines, opened, strict=True) if is_open]
    try:
        yield begun
    except BaseException:
        for engine in begun:
            engine.fail("the trainer broke off")
        raise
    finally:
        _end(begun)


def _end(begun: Sequence[Engine]) -> None:
    def end(engine: Engine) -> None:
        if engine.error is None:
            engine.post("end_weight_update", {})
        else:
            engine.try_post("end_weight_update", {})

    each(begun, end)


def _failure(engines: Sequence[Engine], version: int) -> EngineDied | StaleWeights:
    words = [
        f"{engine.url} serves {'nobody knows what' if engine.version is None else engine.version}"
        + (f"{'' if engine.lost else ' and is paused'} ({engine.error})" if engine.error else "")
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


def with_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item, and whether it is the last one."""
    before: list[Item] = []
    for item in items:
        if before:
            yield before[0], False
        before = [item]
    for item in before:
        yield item, True


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
