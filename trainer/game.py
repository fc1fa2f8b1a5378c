"""What a run plays: where tasks come from, who answers, what it is worth."""

from __future__ import annotations

from dataclasses import dataclass

from pacenote.trainer.config import RunConfig
from pacenote.trainer.tasks import (
    Environment,
    JsonlTasks,
    Reward,
    Task,
    TaskSource,
    check_labels,
    load_callable,
    read_jsonl,
)


@dataclass(frozen=True, slots=True)
class Game:
    """Tasks, environment and reward of a run."""

    tasks: TaskSource
    environment: Environment
    reward: Reward

    def task(self, number: int, *, seed: int, prompts: int) -> Task:
        """The task of a group of the run's endless stream: `prompts` of them are a step's."""
        step, place = divmod(number, prompts)
        return self.tasks(seed=seed, step=step, count=prompts)[place]

    @classmethod
    def load(cls, config: RunConfig) -> Game:
        """Import what the configuration names.

        Raises:
            ValueError: a file or an import path is wrong; the message names the flag.
        """
        if config.data is None:
            play, worth = f"{config.task}:play", f"{config.task}:reward"
            tasks = load_callable(f"{config.task}:make_tasks", "task")
        else:
            play, worth = "pacenote.trainer.tasks:single_turn", "pacenote.trainer.tasks:contains_label"
            tasks = read_jsonl(config.data)
        game = cls(
            tasks=tasks,
            environment=load_callable(config.environment or play, "environment"),
            reward=load_callable(config.reward or worth, "reward"),
        )
        if isinstance(tasks, JsonlTasks):
            check_labels(game.reward, tasks.rows)
        return game
