"""Errors of the replay floor. All are `ValueError`s: the input, the model or the order of calls was not as expected.

ReplayError
  RecordError        a routing record whose parts do not fit together
  PayloadError       an engine's answer that is not the routes it should be
  UnsupportedModel   a model or config whose routers cannot be replayed
  ScopeError         rows that do not fit the model's input, or a scope used out of order
"""

from __future__ import annotations


class ReplayError(ValueError):
    """Base of the tree. The text says what was expected, what came and what to do."""


class RecordError(ReplayError):
    """Parts of a routing record do not fit together."""


class PayloadError(ReplayError):
    """An engine's routing payload is malformed."""


class UnsupportedModel(ReplayError):
    """A model or config whose routers are unknown, or do not behave as their spec says."""


class ScopeError(ReplayError):
    """Rows that do not fit the model's input, or a scope that was nested, unread or read too often."""
