"""What the first rank alone does: servers, rollouts, the screen, and what the run leaves behind.

All ranks call the same methods. The first one works, the others wait for what it finds; what it raises, all raise.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from transformers import AutoConfig

from pacenote.replay.audit import Audit
from pacenote.trainer import evaluate, flops, metrics, sensors, sync
from pacenote.trainer.advantage import Advantages, advantages, longest_answer, overlong_penalty
from pacenote.trainer.backend import Backend
from pacenote.trainer.batch import Sample, Step, share_out
from pacenote.trainer.collect import collect
from pacenote.trainer.config import RunConfig
from pacenote.trainer.display import Display
from pacenote.trainer.episode import Episode, check_versions
from pacenote.trainer.errors import EngineDied
from pacenote.trainer.fleet import Fleet
from pacenote.trainer.game import Game
from pacenote.trainer.gap import Gap
from pacenote.trainer.interrupt import Interrupt
from pacenote.trainer.phases import Phases
from pacenote.trainer.position import Position
from pacenote.trainer.rollouts import Rollouts, Taken
from pacenote.trainer.rundir import RunDir
from pacenote.trainer.trackers import Trackers
from pacenote.trainer.watch import Watch

EVAL_SEED = 0xE7A1  # answers are drawn apart from training's


class Leader:
    """Servers up, weights in, episodes out, numbers down. In its context play, measured and record take turns."""

    def __init__(
        self, config: RunConfig, run: RunDir, game: Game, backend: Backend, *, first: int, position: Position
    ) -> None:
        """Nothing runs before the context is entered.

        Args:
            config: of the run.
            run: its folder.
            game: tasks, environment and reward.
            backend: the model that is served.
            first: the step that the run goes on with, which is the version of the weights that are there.
            position: where it goes on in the stream of groups.
        """
        self.config, self.run, self.game, self.backend = config, run, game, backend
        self.phases = Phases()
        self._world, self._first, self._start = backend.world, first, position
        self._stack = ExitStack()
        # Checked here, before anything runs.
        self._held_out = (
            evaluate.held_out(config.eval, game.tasks, seed=config.seed, training=config.data)
            if config.eval.every
            else []
        )

    def __enter__(self) -> Leader:
        """Start the servers with the first weights.

        Raises:
            TrainerError: one did not come up.
        """
        self._places = self._world.gather(self.backend.place)
        self._world.alone(self._begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        self._stack.__exit__(kind, error, trace)

    def _begin(self) -> None:
        with ExitStack() as stack:
            config = self.config
            self._stop = stack.enter_context(Interrupt())
            self._fleet = stack.enter_context(
                Fleet(
                    config.rollout,
                    weights=self.run.weights,
                    logs=self.run.logs,
                    seed=config.seed,
                    device=self.backend.device,
                    exact=config.exact,
                    engine=config.engine,
                    push=config.sync,
                )
            )
            self._log = stack.enter_context(metrics.MetricsLog(self.run.metrics, first_step=self._first))
            self._trackers = stack.enter_context(Trackers(config.track, self.run.root))
            self._display = stack.enter_context(Display(config, self.run))
            self._fleet.start(self._first)
            sessions = self._fleet.sessions_url
            rollouts = Rollouts(self.game, config.rollout, sessions=sessions, seed=config.seed, position=self._start)
            self._rollouts = stack.enter_context(rollouts)
            self._flops = flops.Flops.of(AutoConfig.from_pretrained(sync.weights_path(self.run.weights, self._first)))
            self._watch = Watch([self._stop.check, self._fleet.check])
            self._stack = stack.pop_all()

    @property
    def position(self) -> Position | None:
        """Where the run would go on in the stream; the leader knows."""
        return self._world.alone(lambda: self._rollouts.position)

    def play(self, weights: sync.Weights, version: int) -> tuple[list[Step], Sample | None]:
        """Serve the weights of `version`, and have a step's samples. A dead engine is revived, and the step played on.

        Returns:
            This rank's share, by optimizer step and microbatch, and a sample that fillers can be made of.

        Raises:
            EngineDied: it cannot be revived.
            Interrupted: a person asked to stop; nothing was trained on.
        """
        self.phases = Phases()
        parts = self._world.alone(lambda: self._play(weights, version))
        return self._world.scatter(parts)

    def record(self, version: int, gap: Gap, audit: Audit, learnt: dict[str, Any]) -> None:
        """The step is over: its row, samples and screen.

        Args:
            version: of the weights that the step began with.
            gap: over all ranks.
            audit: what this rank's routers counted.
            learnt: metrics of the update, over all ranks.

        Raises:
            OSError: they cannot be written.
        """
        audits = self._world.gather(audit)
        self._world.alone(lambda: self._record(version, gap, audits, learnt))

    def _play(self, weights: sync.Weights, version: int) -> list[tuple[list[Step], Sample | None]]:
        taken, self._evaluation = self._take(weights, version)
        episodes, self._stale = check_versions(taken.episodes, version, bound=self.config.rollout.max_staleness)
        self._episodes, self._refused = episodes, taken.refused
        rewards = [shaped(episode, self.config) for episode in episodes]
        self._earned = advantages(rewards, self.config.rollout.group, self.config.advantage)
        samples = learnable(episodes, self._earned, self.config.rollout.group)
        seed = self.config.seed * 1_000_003 + version
        parts = share_out(samples, self.config.optim, self.backend.place, seed=seed)
        spare = min(samples, key=lambda sample: len(sample.trajectory.tokens), default=None)
        return [(parts[place.data_rank], spare) for place in self._places]

    def _take(self, weights: sync.Weights, version: int) -> tuple[Taken, dict[str, Any]]:
        taken: Taken | None = None
        while True:
            try:
                self._stop.check()
                with self.phases("sync"):
                    self._fleet.serve(weights, version)
                with self.phases("rollout"):
                    taken = taken or self._rollouts.take(version, self._watch)
                return taken, self._evaluate(version)
            except EngineDied as error:
                self._rollouts.break_off()
                self._fleet.revive(weights.on_disk(), version, error)

    def _record(self, version: int, gap: Gap, audits: list[Audit], learnt: dict[str, Any]) -> None:
        if version % self.config.samples_every == 0 or version == self.config.steps - 1:
            self.run.write_samples(version, self._episodes)
        refused = {f"groups_refused_{reason}": count for reason, count in self._refused.items()}
        seconds = self.phases.seconds()
        more = {**learnt, "samples_stale": self._stale, **refused, **self._evaluation, **sensors.read(os.environ)}
        more |= self._utilisation(seconds["seconds"])
        row = metrics.row(version, self._episodes, self._earned, gap, audits, more, seconds)
        self._log.append(row)
        self._trackers.log(version, row)
        self._display.show(row)

    def _utilisation(self, seconds: float) -> dict[str, float]:
        """Model operations of learning a second, and their share of the GPUs' peak where that is known."""
        lengths = [len(t.tokens) - 1 for episode in self._episodes for t in episode.trajectories]
        learning = self._flops.learning(lengths, frozen=self.config.lora.rank > 0)
        rate = learning / max(seconds, 1e-9)
        peak = flops.peak(torch.cuda.get_device_name()) if self.backend.device.startswith("cuda") else None
        known = {} if peak is None else {"mfu": rate / (peak * self._world.size)}
        return {"model_tflops": rate / 1e12, **known}

    def _evaluate(self, version: int) -> dict[str, Any]:
        """Columns of an evaluation with the weights that are served, where one is due; nothing of training moves."""
        config = self.config
        if not evaluate.due(config.eval, version, config.steps - 1):
            return {}
        asked = config.eval
        rollout = replace(
            config.rollout,
            group=asked.samples,
            temperature=asked.temperature,
            max_tokens=asked.max_tokens or config.rollout.max_tokens,
        )
        with self.phases("eval"):
            episodes = collect(
                self._held_out,
                self.game.environment,
                self.game.reward,
                sessions=self._fleet.sessions_url,
                config=rollout,
                seed=config.seed ^ EVAL_SEED,
                watch=self._watch,
            )
        return evaluate.of_evaluation(episodes, asked.samples)


def shaped(episode: Episode, config: RunConfig) -> float | None:
    """An episode's reward, less what its longest answer costs for being nearly too long."""
    if episode.reward is None or not config.overlong_buffer:
        return episode.reward
    longest = max((longest_answer(trajectory.loss_mask) for trajectory in episode.trajectories), default=0)
    return episode.reward + overlong_penalty(longest, config.rollout.max_tokens, config.overlong_buffer)


def learnable(episodes: list[Episode], earned: Advantages, group: int) -> list[Sample]:
    """Samples of the episodes that have an advantage; NaN marks one without a countable reward."""
    return [
        Sample(trajectory, advantage, number // group)
        for number, (episode, advantage) in enumerate(zip(episodes, earned.values.tolist(), strict=True))
        if advantage == advantage
        for trajectory in episode.trajectories
    ]
