"""The main path: rollout -> routes -> replay -> step -> new weights. Read this file first.

Weights of version v are those after v training steps. Step v serves version v, rolls out, and makes version v + 1.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pacenote.trainer import checkpoint, metrics, sync
from pacenote.trainer.advantage import advantages, longest_answer, overlong_penalty
from pacenote.trainer.batch import Sample, microbatches, split_steps
from pacenote.trainer.collect import Episode, Watch, check_versions, collect
from pacenote.trainer.config import RunConfig
from pacenote.trainer.display import Display
from pacenote.trainer.errors import CannotSave, EngineDied, NotFinite, TrainerError
from pacenote.trainer.fleet import Fleet, check_engine
from pacenote.trainer.game import Game
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.interrupt import Interrupt
from pacenote.trainer.model import build_tiny
from pacenote.trainer.report import write_report
from pacenote.trainer.rundir import RunDir
from pacenote.trainer.step import prepare, update


def train(config: RunConfig) -> RunDir:
    """Run from the start.

    Raises:
        ValueError: the configuration cannot work; nothing was started.
        TrainerError: the run stopped early; the message says how to go on.
    """
    check_engine(config.engine)
    game = Game.load(config)
    device = pick_device(config)
    run = RunDir.create(config)
    model = config.model or build_tiny(run.root / "model", seed=config.seed, shape=config.tiny)
    backend = make_backend(config, model, device)
    return _run(config, run.begin(config), game, backend, first=0)


def resume(root: Path) -> RunDir:
    """Go on with an interrupted run, from its newest checkpoint.

    Raises:
        ValueError: the folder holds no run, or no checkpoint.
        TrainerError: the run stopped early; the message says how to go on.
    """
    run, config = RunDir.open(root)
    check_engine(config.engine)
    game = Game.load(config)
    step, path = checkpoint.latest(run.checkpoints)
    backend = make_backend(config, path / "model", pick_device(config))
    checkpoint.restore(path, backend)
    return _run(config, run, game, backend, first=step)


def make_backend(config: RunConfig, model: Path, device: str) -> HfBackend:
    """The back end of a run, with the weights of a model directory.

    Raises:
        ValueError: as `HfBackend`.
    """
    if config.threads:  # before anything is computed: an exact back end tries itself out as it will run
        torch.set_num_threads(config.threads)
    temperature = config.rollout.temperature
    return HfBackend(model, config.optim, device=device, temperature=temperature, exact=config.exact)


def load_reference(config: RunConfig, run: RunDir, backend: HfBackend) -> HfBackend | None:
    """The frozen policy that the KL is to, beside the backend; None without a KL."""
    if not config.loss.kl_coef:
        return None
    model = config.reference or config.model or run.root / "model"
    reference = make_backend(config, model, backend.device)
    reference.model.requires_grad_(False)
    return reference


def shaped(episode: Episode, config: RunConfig) -> float | None:
    """An episode's reward, less what its longest answer costs for being nearly too long."""
    if episode.reward is None or not config.overlong_buffer:
        return episode.reward
    longest = max((longest_answer(trajectory.loss_mask) for trajectory in episode.trajectories), default=0)
    return episode.reward + overlong_penalty(longest, config.rollout.max_tokens, config.overlong_buffer)


def pick_device(config: RunConfig) -> str:
    """The trainer's device.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() and not config.exact else "cpu"


def _run(config: RunConfig, run: RunDir, game: Game, backend: HfBackend, *, first: int) -> RunDir:
    """All steps from `first` on; whatever stops them, there is a report, and a word on how to go on."""
    try:
        return _steps(config, run, game, backend, first=first)
    except TrainerError as error:
        error.add_note(f"Go on with: pacenote train --resume {run.root}")
        raise
    except OSError as error:
        stopped = CannotSave(f"{error.filename or run.root} cannot be written: {error.strerror or error}")
        stopped.add_note(f"Free space, then go on with: pacenote train --resume {run.root}")
        raise stopped from error
    finally:
        with contextlib.suppress(OSError):
            write_report(run.root)


def _steps(config: RunConfig, run: RunDir, game: Game, backend: HfBackend, *, first: int) -> RunDir:
    version = first
    run.write_environment(device=backend.device, moe_layers=backend.replay.layers)
    backend.save_weights(sync.weights_path(run.weights, first))
    with ExitStack() as stack:
        stack.callback(backend.close)
        reference = load_reference(config, run, backend)
        if reference is not None:
            stack.callback(reference.close)
        stop = stack.enter_context(Interrupt())
        fleet = stack.enter_context(
            Fleet(
                config.rollout,
                weights=run.weights,
                logs=run.logs,
                seed=config.seed,
                device=backend.device,
                exact=config.exact,
                engine=config.engine,
                push=config.sync,
            )
        )
        log = stack.enter_context(metrics.MetricsLog(run.metrics, first_step=first))
        display = stack.enter_context(Display(config, run))
        try:
            fleet.start(first)
            while version < config.steps:
                row = one_step(config, run, game, backend, fleet, stop, version, reference)
                version += 1
                log.append(row)
                display.show(row)
                if version % config.checkpoint.every == 0 or version == config.steps:
                    checkpoint.save(run.checkpoints, backend, step=version, keep=config.checkpoint.keep)
        except TrainerError as error:
            # NotFinite may come between two optimizer steps of one training step.
            if not isinstance(error, NotFinite | CannotSave):
                checkpoint.save(run.checkpoints, backend, step=version, keep=config.checkpoint.keep)
            raise
    return run


def one_step(
    config: RunConfig,
    run: RunDir,
    game: Game,
    backend: HfBackend,
    fleet: Fleet,
    stop: Interrupt,
    version: int,
    reference: HfBackend | None = None,
) -> dict[str, Any]:
    """Serve the weights of `version`, roll out, train on the answers; returns the step's row of metrics."""
    times = [time.perf_counter()]
    episodes, stale = rollout(config, run, game, backend, fleet, stop, version)
    times.append(time.perf_counter())

    rewards = [shaped(episode, config) for episode in episodes]
    earned = advantages(rewards, config.rollout.group, config.advantage)
    samples = [
        Sample(trajectory, advantage, number // config.rollout.group)
        for number, (episode, advantage) in enumerate(zip(episodes, earned.values.tolist(), strict=True))
        if advantage == advantage  # NaN marks an episode without a countable reward
        for trajectory in episode.trajectories
    ]
    steps = [
        microbatches([samples[i] for i in part], config.optim, backend.device)
        for part in split_steps(len(samples), config.optim.minibatches, seed=config.seed * 1_000_003 + version)
    ]
    prepared, gap = prepare(backend, steps, config.replay, version=version, reference=reference)
    times.append(time.perf_counter())

    backend.audit()  # the counters so far are of the measurements
    lr = backend.set_lr(version, config.steps)
    learnt = update(backend, prepared, config.loss, answer_tokens=config.rollout.max_tokens)
    times.append(time.perf_counter())
    if version % config.samples_every == 0 or version == config.steps - 1:
        run.write_samples(version, episodes)
    more = {**learnt, "lr": lr, "samples_stale": stale}
    return metrics.row(version, episodes, earned, gap, backend.audit(), more, times)


def rollout(
    config: RunConfig, run: RunDir, game: Game, backend: HfBackend, fleet: Fleet, stop: Interrupt, version: int
) -> tuple[list[Episode], int]:
    """Episodes sampled with the weights of `version`, and how many samples were left out because theirs were too old; a
    dead engine is revived with them and the step replayed.

    Raises:
        EngineDied: it cannot be revived.
        Interrupted: a person asked to stop; nothing was trained on.
    """
    tasks = game.tasks(seed=config.seed, step=version, count=config.rollout.prompts)
    watch = Watch([stop.check, fleet.check])
    weights = sync.Weights(sync.weights_path(run.weights, version), backend.save_weights, backend.tensors)
    while True:
        try:
            stop.check()
            fleet.serve(weights, version)
            episodes = collect(
                tasks,
                game.environment,
                game.reward,
                sessions=fleet.sessions_url,
                config=config.rollout,
                seed=config.seed * 1_000_003 + version,
                watch=watch,
            )
            break
        except EngineDied as error:
            fleet.revive(weights.on_disk(), version, error)
    return check_versions(episodes, version, bound=config.rollout.max_staleness)
