"""What replay costs a training step of the transformers back end: time, memory, bytes.

    python -m benchmarks.replay_cost --out benchmarks/results

The trainer's own `backend.pack`, `prepare` and `update` over the same samples, with `--replay` off, rollout and
trainer. `off` is the trainer as it is: it records its own routing and measures the gap to the engine's, whether it
replays or not. `rollout_only` is rollout in a step without that measurement (`--gap-every`), which needs one pass less.
`none` is less than a mode: the hooks taken off, samples that bring no routes, old logprobs compared
with nothing.

Random tokens; a sample's second half is its answer. Routes and logprobs of the rollout are the model's own of a pass
before, not an engine's: so every mode sends as many tokens to each expert, where random routes would spread them evenly
and be other work. The learning rate is 0, so that every repeat does the same. A round runs each mode once, in an order
that turns from round to round; an overhead is the median over rounds of a mode's time over that of `off` in the same
round. Times are the wall's, and those of the processors, which others on the machine disturb less; on a GPU the latter
mean nothing. Peaks, of a pass that is not timed, count every tensor made in it beyond weights, moments and what it was
given.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks import machine, replay_bytes, timing
from benchmarks.models import MODELS
from benchmarks.replay_models import ON_CPU, ON_GPU, SUBJECTS, Subject, build
from benchmarks.sensors import Sensors
from benchmarks.table import Table
from pacenote.kernels.policy import PolicyConfig
from pacenote.kernels.spec import DECODE
from pacenote.replay.hf import attach
from pacenote.replay.record import RoutingRecord
from pacenote.trainer.backend import Divisor, Prepared
from pacenote.trainer.batch import Microbatch, Sample, Step, share_out
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.phases import Phases
from pacenote.trainer.step import ReplayMode, prepare, update

MODES = ("none", "off", "rollout", "rollout_only", "trainer")
WORKS = ("pack", "prepare", "learn", "step")
"""Packing; old logprobs and the gap; forward and backward of the loss; all of a step, the optimizer's part included."""
LOSS = PolicyConfig()
FEWEST = 3
"""Rounds, however long they take."""


CPU_TOKENS, GPU_TOKENS, REAL_TOKENS = 1024, 16384, 8192
CPU_REPEATS, GPU_REPEATS = 15, 10


def rollout(backend: HfBackend, subject: Subject, tokens: int) -> list[Sample]:
    """Samples of about `tokens` positions in all, of uneven lengths."""
    generator, left, made = np.random.default_rng(0), tokens, list[Sample]()
    geometry = backend.replay.geometry
    while left > 0:
        length = min(left, max(4, int(subject.longest * generator.uniform(0.5, 1.0))))
        ids = generator.integers(0, backend.model.config.vocab_size, length + 1)
        blank = RoutingRecord.empty(geometry, length)
        trajectory = replay_bytes.sample(ids, blank)
        [item] = backend.pack([[Sample(trajectory, 1.0)]], None)
        logprobs, routes = backend.score_native(item.batch)
        own = RoutingRecord.of(routes.rows.cpu().numpy(), geometry, provenance=DECODE, version=0)
        said = np.concatenate([[0], logprobs.cpu().numpy()]).astype(np.float32) * trajectory.loss_mask
        whole = replace(trajectory, experts=own.experts, logprobs=said)
        made.append(Sample(whole, float(generator.choice([-1.0, 1.0])), len(made) // 4))
        left -= length
    return made


class Clock(Phases):
    """Phases timed until the device is done, by the wall and by the time of this process's processors."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device, self._processor = device, defaultdict[str, float](float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block."""
        self._wait()
        start = time.process_time()
        with super().__call__(name):
            yield
            self._wait()
        self._processor[name] += time.process_time() - start

    def taken(self, name: str) -> Taken:
        """What a phase took."""
        return Taken(self.seconds()[f"seconds_{name}"], self._processor[name])

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds by the wall and of the processors."""

    wall: float
    processor: float


class Trainer:
    """A back end and a training step's samples.

    Attributes:
        backend: the model.
        samples: with routes.
        rows: positions of all of them.
    """

    def __init__(self, directory: Path, subject: Subject, tokens: int, device: torch.device) -> None:
        config = OptimConfig(lr=0.0, minibatches=1, microbatch_tokens=subject.microbatch)
        self.backend = HfBackend(directory, config, device=str(device), temperature=1.0)
        self.samples = rollout(self.backend, subject, tokens)
        self.rows = sum(len(sample.trajectory) - 1 for sample in self.samples)
        bare = [replace(s, trajectory=replay_bytes.without_routes(s.trajectory)) for s in self.samples]
        [[self._step], [self._bare]] = (
            share_out(samples, config, self.backend.place, seed=0)[0] for samples in (self.samples, bare)
        )

    def pack(self, mode: str) -> list[Microbatch]:
        """The step's microbatches."""
        step: Step = self._bare if mode == "none" else self._step
        return self.backend.pack(step, None)

    def prepare(self, mode: str, items: Sequence[Microbatch]) -> list[Prepared]:
        """Old logprobs, and what the update replays."""
        if mode == "rollout_only":
            return prepare(self.backend, [items], "rollout", compare=False)[0][0]
        if mode in get_args(ReplayMode):
            return prepare(self.backend, [items], mode)[0][0]  # type: ignore[arg-type]
        old = self.backend.scores(items, [None] * len(items))
        return [
            Prepared(replace(item.batch, old_logprobs=logprobs), None, item.groups)
            for item, logprobs in zip(items, old, strict=True)
        ]

    def learn(self, prepared: Sequence[Prepared]) -> None:
        """Forward and backward alone, as `update` has them; the gradients go."""
        tokens = sum(int(item.batch.loss_mask.sum()) for item in prepared)
        self.backend.accumulate(prepared, [Divisor(tokens)] * len(prepared), LOSS)
        self.backend.optimizer.zero_grad()

    @contextmanager
    def hooks(self, mode: str) -> Iterator[None]:
        """The model without the replay's hooks, if the mode knows of none."""
        if mode != "none":
            yield
            return
        self.backend.close()
        try:
            yield
        finally:
            self.backend.replay = attach(self.backend.model)

    def step(self, mode: str) -> dict[str, Taken]:
        """One step by the clock: each of WORKS."""
        clock = Clock(self.backend.device)
        gc.collect()
        with self.hooks(mode), clock("step"):
            with clock("pack"):
                items = self.pack(mode)
            with clock("prepare"):
                prepared = self.prepare(mode, items)
            update(self.backend, [prepared], LOSS, phases=clock)
        return {work: clock.taken(work) for work in WORKS}

    def peaks(self, mode: str) -> dict[str, int]:
        """Bytes at the peak of each part."""
        measure = timing.peak_bytes if self.backend.device.startswith("cuda") else timing.peak_bytes_cpu
        with self.hooks(mode):
            packing = measure(partial(self.pack, mode))
            items = self.pack(mode)
            preparing = measure(partial(self.prepare, mode, items))
            prepared = self.prepare(mode, items)
            return {"pack": packing, "prepare": preparing, "learn": measure(partial(self.learn, prepared))}

    def check(self, mode: str) -> None:
        """Rows are replayed as often as the mode says, and change no logprob beyond rounding: they are the model's own.

        Raises:
            AssertionError: they are not.
        """
        self.backend.audit()
        with self.hooks(mode):
            items = self.pack(mode)
            prepared = self.prepare(mode, items)
            self.learn(prepared)
        times = {"rollout": 2, "rollout_only": 2, "trainer": 1}.get(mode, 0)
        expected = times * self.rows * len(self.backend.replay.layers)
        replayed = self.backend.audit().total("replayed") if mode != "none" else 0
        assert replayed == expected, f"{mode}: {replayed} rows were replayed, expected {expected}"
        for item in prepared:
            assert item.batch.old_logprobs is not None
            apart = (item.batch.old_logprobs - item.batch.logprobs)[item.batch.loss_mask].abs().mean()
            assert apart < 0.01, f"{mode}: old logprobs are {float(apart)} away"

    def routes_held(self, mode: str) -> int:
        """Bytes of the routes that wait for the update, those of the batches left out."""
        prepared = self.prepare(mode, self.pack(mode))
        held = [item.routes for item in prepared if item.routes is not None]
        return sum(replay_bytes.nbytes(routes.rows) + replay_bytes.nbytes(routes.state) for routes in held)


def rounds(trainer: Trainer, repeats: int, end: float) -> dict[str, list[dict[str, Taken]]]:
    """Each mode's steps, a round one after the other; fewer rounds than asked for if `end` comes."""
    found: dict[str, list[dict[str, Taken]]] = {mode: [] for mode in MODES}
    for mode in MODES:
        trainer.step(mode)  # what is done once is not measured
    for number in range(repeats):
        if number >= FEWEST and time.monotonic() > end:
            break
        turned = [*MODES[number % len(MODES) :], *MODES[: number % len(MODES)]]
        for mode in turned if number % 2 else reversed(turned):
            found[mode].append(trainer.step(mode))
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return statistics.median(values), tenths[0], tenths[-1]


def over(these: Sequence[float], those: Sequence[float]) -> tuple[float, float, float]:
    """By how many percent these exceed those, pair by pair: median, 10th and 90th percentile."""
    return spread([100 * (mine / theirs - 1) for mine, theirs in zip(these, those, strict=True)])


def timed(mine: Sequence[Taken], off: Sequence[Taken], none: Sequence[Taken]) -> dict[str, Any]:
    """A mode's times, and by how much they exceed those of `off` and `none`."""
    median, low, high = spread([taken.wall for taken in mine])
    columns = {"repeats": len(mine), "median_us": median * 1e6, "p10_us": low * 1e6, "p90_us": high * 1e6}
    columns["least_us"] = min(taken.wall for taken in mine) * 1e6
    columns["processor_us"] = statistics.median(taken.processor for taken in mine) * 1e6
    columns["processor_least_us"] = min(taken.processor for taken in mine) * 1e6
    for clock in ("wall", "processor"):
        ours, theirs, bare = ([getattr(taken, clock) for taken in times] for times in (mine, off, none))
        prefix = "" if clock == "wall" else "processor_"
        names = ("over_off_percent", "over_off_p10", "over_off_p90")
        columns |= {f"{prefix}{name}": value for name, value in zip(names, over(ours, theirs), strict=True)}
        columns[f"{prefix}over_none_percent"] = over(ours, bare)[0]
    return columns


def beyond(peaks: dict[str, dict[str, int]], mode: str, work: str) -> int | None:
    """Bytes of a mode's peak beyond that of `off`; None where no peak was taken."""
    return peaks[mode][work] - peaks["off"][work] if work in peaks[mode] else None


def measure(trainer: Trainer, name: str, repeats: int, end: float) -> Iterator[dict[str, Any]]:
    """The rows of a model: each part of a step in each mode, then the bytes."""
    for mode in MODES:
        trainer.check(mode)
    found, peaks = rounds(trainer, repeats, end), {mode: trainer.peaks(mode) for mode in MODES}
    batches, geometry = [item.batch for item in trainer.pack("rollout")], trainer.backend.replay.geometry
    shape = {
        "layers": len(geometry.layers), "experts": geometry.num_experts, "k": geometry.top_k,
        "samples": len(trainer.samples), "microbatches": len(batches),
    }  # fmt: skip
    for work in WORKS:
        for mode in MODES:
            times = {of: [taken[work] for taken in found[of]] for of in (mode, "off", "none")}
            yield {
                "model": name, "tokens": trainer.rows, "work": work, "implementation": mode, **shape,
                "method": "clock, modes by turns", **timed(times[mode], times["off"], times["none"]),
                "peak_bytes": peaks[mode].get(work), "peak_over_off_bytes": beyond(peaks, mode, work),
            }  # fmt: skip
    held = {f"held_{mode}": trainer.routes_held(mode) for mode in MODES[1:]}
    yield replay_bytes.row(name, [sample.trajectory for sample in trainer.samples], batches, **held)


def of_subject(name: str, tokens: int, repeats: int, device: torch.device, end: float) -> Iterator[dict[str, Any]]:
    """The rows of a model, which is built for them and gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        directory = build(SUBJECTS[name].config(), Path(folder), device)
        trainer = Trainer(directory, SUBJECTS[name], tokens, device)
    yield from measure(trainer, name, repeats, end)
    trainer.backend.close()
    del trainer
    gc.collect()  # hooks and model know each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def facts(device: torch.device) -> dict[str, Any]:
    """What the rows were measured on."""
    sensors = Sensors(device)
    known = machine.facts(device, sensors, machine.ceilings(device))
    more = {"transformers": version("transformers"), "threads": torch.get_num_threads(), "load_before": load()}
    if device.type == "cuda":
        return {**known, **more}
    found = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc") else []
    return {**known, "device": "cpu", "processor": found[0] if found else known["device"], **more}


def load() -> list[float]:
    """Processes that wanted a core, averaged over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    head = f"{row['model']:>24} T={row['tokens']:<6}"
    if row["work"] == "bytes":
        parts = (f"{name} {row[f'{name}_a_token']:.2f}" for name in ("wire_routes", "host_routes", "device_routes"))
        return f"{head} bytes a token: {', '.join(parts)}, other fields {row['device_other_a_token']:.2f}"
    peak = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 1e6:.1f} MB"
    return (
        f"{head} {row['work']:<8} {row['implementation']:<12} {row['median_us'] / 1e3:>10.1f} ms "
        f"{row['over_off_percent']:>+7.1f} % [{row['over_off_p10']:+.1f}, {row['over_off_p90']:+.1f}] "
        f"processor {row['processor_over_off_percent']:>+6.1f} %{peak}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay_cost", description=about)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, help=f"default: {ON_GPU} on a GPU, else {ON_CPU}")
    parser.add_argument("--tokens", type=int, help=f"of a step; default: {GPU_TOKENS} on a GPU, else {CPU_TOKENS}")
    parser.add_argument("--repeats", type=int, help=f"rounds; default: {GPU_REPEATS} on a GPU, else {CPU_REPEATS}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model or round after so long")
    asked = parser.parse_args(words)
    device = machine.pick_device()
    on_gpu, end = device.type == "cuda", time.monotonic() + asked.seconds
    known = facts(device)
    table = Table("replay_cost", known, asked.out)
    slug = re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-")
    table.path = asked.out / f"replay_cost-{slug}-{known['date'][:10].replace('-', '')}.json"
    tokens, repeats = asked.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS), asked.repeats
    for name in asked.models or (ON_GPU if on_gpu else ON_CPU):
        if time.monotonic() > end:
            table.left_out.append(name)
            continue
        for row in of_subject(name, tokens, repeats or (GPU_REPEATS if on_gpu else CPU_REPEATS), device, end):
            table.add(row)
            print(line(row), flush=True)
    for name in MODELS:
        table.add(replay_bytes.of_real_model(name, min(asked.tokens or REAL_TOKENS, REAL_TOKENS), str(device)))
        print(line(table.rows[-1]), flush=True)
    known["load_after"] = load()
    print("written:", *table.close())
    return 0


if __name__ == "__main__":
    sys.exit(main())
