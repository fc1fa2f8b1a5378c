"""Errors around workers and the routers in front of them.

WorkerError
  RouterError        the router is not there, too slow, or answers what no known router answers
    UnknownDialect   it speaks neither of the two dialects
    RouterRefused    it said no
  NotConfirmed       it took the call, but its listing does not show the result in time
  RoleMismatch       a worker is, or was listed as, something else than it should be
  EngineError        the engine does not answer, or not as an engine does
    EngineGone       nobody listens at its address
    WrongWeights     it serves another weight version than it should
  IncompletePool     nothing can be served: no worker is current, or a prefill side has no decode side, or the reverse
  Superseded         the worker was changed by somebody else meanwhile; nothing was done
"""

from __future__ import annotations


class WorkerError(RuntimeError):
    """Base of the tree."""


class RouterError(WorkerError):
    """The router is not there, too slow, or answers what no known router answers."""


class UnknownDialect(RouterError):
    """The router speaks neither of the two dialects."""


class RouterRefused(RouterError):
    """The router said no.

    Args:
        message: what was asked and what it answered.
        status: HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotConfirmed(WorkerError):
    """The router took the call, but its listing does not show the result in time."""


class RoleMismatch(WorkerError):
    """A worker is, or was listed as, something else than it should be."""


class EngineError(WorkerError):
    """The engine does not answer, or not as an engine does."""


class EngineGone(EngineError):
    """Nobody listens at the engine's address."""


class WrongWeights(EngineError):
    """The engine serves another weight version than it should."""


class IncompletePool(WorkerError):
    """Nothing can be served: no worker is current, or one side of prefill and decode is missing."""


class Superseded(WorkerError):
    """The worker was changed by somebody else meanwhile; nothing was done."""
