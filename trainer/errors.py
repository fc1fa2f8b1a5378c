"""What can go wrong in a run, one class a cause; each message is one sentence that a person can act on.

- TrainerError
    - EngineDied: the rollout engine's process ended or stopped answering.
    - StaleWeights: an answer was sampled with other weights than the trainer's last push.
    - NotFinite: losses or gradients are NaN, infinite or far too large, one after the other.
    - CannotSave: a checkpoint, weights or metrics could not be written, most often for want of space.
    - TaskFailed: the environment or the reward raised.
    - Interrupted: a person asked the run to stop.
"""

from __future__ import annotations


class TrainerError(Exception):
    """Base of the tree; `exit_code` is what the command line ends with."""

    exit_code = 1


class EngineDied(TrainerError):
    """The rollout engine's process ended or stopped answering."""


class StaleWeights(TrainerError):
    """An answer was sampled with other weights than the trainer's last push."""


class NotFinite(TrainerError):
    """Too many optimizer steps in a row were skipped; the weights of the last good one are kept."""


class CannotSave(TrainerError):
    """Something could not be written, most often for want of space; what was written before is whole."""


class TaskFailed(TrainerError):
    """The environment or the reward raised; the message names the place."""


class Interrupted(TrainerError):
    """A person asked the run to stop; its state is saved."""

    exit_code = 130
