"""Errors of the session server. Each carries an HTTP status and OpenAI's `type`, `param` and `code`.

StartupError            the server cannot start; the text is the one sentence to print
SessionError
  BadRequest        400  a body that is not a chat request
  RoleRefused       400  a message of a role that may not be appended
  ContextExceeded   400  longer than the engine's context; code context_length_exceeded
  SessionGone       410  the session was deleted
  UpstreamRefused   4xx  the engine refused the request
  UpstreamBroken    502  the engine did not answer, or its answer is not one that can be trained on
  UpstreamAborted   503  the engine ended the answer early
"""

from __future__ import annotations

from typing import Any


class StartupError(ValueError):
    """The server cannot start."""


class SessionError(Exception):
    """Base of the tree."""

    status = 500
    kind = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """Keep the request field that is at fault, if one is."""
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class BadRequest(SessionError):
    """A body that is not a chat request."""

    status, kind = 400, "invalid_request_error"


class RoleRefused(BadRequest):
    """A message of a role that may not be appended."""

    code = "role_not_allowed"


class ContextExceeded(BadRequest):
    """Longer than the engine's context."""

    code = "context_length_exceeded"


class SessionGone(SessionError):
    """The session was deleted."""

    status, kind, code = 410, "invalid_request_error", "session_deleted"


class UpstreamRefused(BadRequest):
    """The engine refused the request, with its own reason."""

    code = "upstream_refused"

    def __init__(self, message: str, *, status: int) -> None:
        """Keep the engine's status, which is below 500."""
        super().__init__(message)
        self.status = status


class UpstreamBroken(SessionError):
    """The engine did not answer, or its answer is not one that can be trained on."""

    status, code = 502, "upstream_broken"


class UpstreamAborted(SessionError):
    """The engine ended the answer early; nothing was recorded."""

    status, code = 503, "upstream_aborted"
