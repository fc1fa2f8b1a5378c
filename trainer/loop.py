"""The main path: rollout -> routes -> replay -> step -> new weights. Read this file first.

Weights of version v are those after v training steps. Step v serves version v, rolls out, and makes version v + 1.
Under torchrun every rank runs this file; what the first one does alone is in `leader.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from pacenote.trainer import checkpoint, lora, sync, trackers
from pacenote.trainer.backend import Backend
from pacenote.trainer.config import RunConfig, in_loss
from pacenote.trainer.errors import CannotSave, NotFinite, TrainerError
from pacenote.trainer.fleet import check_engine
from pacenote.trainer.game import Game
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.leader import Leader
from pacenote.trainer.megatron import MegatronBackend
from pacenote.trainer.model import build_tiny
from pacenote.trainer.position import START, Position, load_position
from pacenote.trainer.report import write_report
from pacenote.trainer.rundir import RunDir
from pacenote.trainer.step import prepare, update
from pacenote.trainer.world import World, local_device

NO_RANKS: Mapping[str, str] = MappingProxyType({})


def train(config: RunConfig, environment: Mapping[str, str] = NO_RANKS) -> RunDir:
    """Run from the start.

    Args:
        config: of the run.
        environment: RANK, WORLD_SIZE and the like where torchrun started this process.

    Raises:
        ValueError: the configuration cannot work; nothing was started.
        TrainerError: the run stopped early; the message says how to go on.
    """
    check_engine(config.engine)
    if config.model is None and config.recipe != "tiny":
        raise ValueError(f"--model expects a model directory: {config.recipe} has no random initialisation of its own")
    trackers.check(config.track)
    lora.check(config.lora)
    game = Game.load(config)
    device = local_device(pick_device(config), environment)
    with World.join(environment, device) as world:
        run = world.lead(lambda: RunDir.create(config))
        model = config.model or world.lead(lambda: build_tiny(run.root / "model", seed=config.seed, shape=config.tiny))
        backend = make_backend(config, model, device, world)
        world.lead(lambda: run.begin(config))
        return _run(config, run, game, backend, first=0, position=START)


def resume(root: Path, environment: Mapping[str, str] = NO_RANKS) -> RunDir:
    """Go on with an interrupted run, from its newest checkpoint.

    Raises:
        ValueError: the folder holds no run, or no checkpoint.
        TrainerError: the run stopped early; the message says how to go on.
    """
    run, config = RunDir.open(root)
    check_engine(config.engine)
    lora.check(config.lora)
    game = Game.load(config)
    step, path = checkpoint.latest(run.checkpoints)
    position = load_position(path, partial(game.task, seed=config.seed, prompts=config.rollout.prompts))
    device = local_device(pick_device(config), environment)
    with World.join(environment, device) as world:
        backend = make_backend(config, path / "model", device, world)
        checkpoint.restore(path, backend)
        return _run(config, run, game, backend, first=step, position=position)


def make_backend(config: RunConfig, model: Path, device: str, world: World) -> Backend:
    """The back end of a run, with the weights of a model directory.

    Raises:
        ValueError: as the back end says.
    """
    if config.threads:  # before anything is computed: an exact back end tries itself out as it will run
        torch.set_num_threads(config.threads)
    temperature = config.rollout.temperature
    if config.backend == "megatron":
        layout = config.megatron
        return MegatronBackend(model, config.optim, layout, device=device, temperature=temperature, world=world)
    return HfBackend(
        model,
        config.optim,
        device=device,
        temperature=temperature,
        exact=config.exact,
        lora=config.lora,
        seed=config.seed,
        world=world,
    )


def load_reference(config: RunConfig, run: RunDir, backend: Backend) -> Backend | None:
    """The frozen policy that the KL is to, beside the backend; None without a KL."""
    if not config.loss.kl_coef:
        return None
    model, plain = config.reference or config.model or run.root / "model", replace(config, lora=lora.ALL_WEIGHTS)
    return make_backend(plain, model, backend.device, backend.world)


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


def _run(config: RunConfig, run: RunDir, game: Game, backend: Backend, *, first: int, position: Position) -> RunDir:
    """All steps from `first` on; whatever stops them, there is a report, and a word on how to go on."""
    try:
        return _steps(config, run, game, backend, first=first, position=position)
    except TrainerError as error:
        error.add_note(f"Go on with: pacenote train --resume {run.root}")
        raise
    except OSError as error:
        stopped = CannotSave(f"{error.filename or run.root} cannot be written: {error.strerror or error}")
        stopped.add_note(f"Free space, then go on with: pacenote train --resume {run.root}")
        raise stopped from error
    finally:
        if backend.world.leads:
            with contextlib.suppress(OSError):
                write_report(run.root)


def _steps(config: RunConfig, run: RunDir, game: Game, backend: Backend, *, first: int, position: Position) -> RunDir:
    version = first
    with ExitStack() as stack:
        stack.callback(backend.close)
        backend.world.alone(lambda: run.write_environment(device=backend.device, moe_layers=backend.moe_layers))
        reference = load_reference(config, run, backend)
        if reference is not None:
            stack.callback(reference.close)
        backend.save_weights(sync.weights_path(run.weights, first))
        leader = stack.enter_context(Leader(config, run, game, backend, first=first, position=position))

        def save() -> None:
            checkpoint.save(
                run.checkpoints, backend, step=version, keep=config.checkpoint.keep, position=leader.position
            )

        try:
            while version < config.steps:
                one_step(config, run, backend, reference, leader, version)
                version += 1
                if version % config.checkpoint.every == 0 or version == config.steps:
                    save()
        except TrainerError as error:
            # NotFinite may come between two optimizer steps of one training step.
            if not isinstance(error, NotFinite | CannotSave):
                save()
            raise
    return run


def one_step(
    config: RunConfig, run: RunDir, backend: Backend, reference: Backend | None, leader: Leader, version: int
) -> None:
    """Serve the weights of `version`, roll out, train on the answers."""
    weights = sync.published(sync.weights_path(run.weights, version), backend)
    share, spare = leader.play(weights, version)
    with leader.phases("pack"):
        steps = [backend.pack(step, spare) for step in share]
    with leader.phases("measure"):
        charge = config.loss if config.kl_in == "reward" else None
        compare = bool(config.gap_every) and version % config.gap_every == 0
        prepared, gap = prepare(
            backend, steps, config.replay, version=version, reference=reference, charge=charge, compare=compare
        )

    backend.audit()  # the counters so far are of the measurements
    lr = backend.set_lr(version, config.steps)
    with leader.phases("update"):
        learnt = update(
            backend, prepared, in_loss(config), answer_tokens=config.rollout.max_tokens, phases=leader.phases
        )
    leader.record(version, gap, backend.audit(), {**learnt, "lr": lr})
