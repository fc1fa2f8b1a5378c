"""Errors of the session server. Each carries an HTTP status and OpenAI's `type`, `param` and `code`.

StartupError            the server cannot start; the text is the one sentence to print
SessionError
  BadRequest        400  a request that cannot be served
    RoleNotAllowed       a message of a role that may not be appended
    ContextOverflow      longer than the engine's context; code context_length_exceeded
    NotLinear            under --policy linear: neither an extension nor a rollback by one answer
    MatchFailed          the function of --match failed on a message
    SessionTooLarge      the session has reached --max-session-bytes
    KeyReused       422  an Idempotency-Key that came with another body before
  Unauthorized      401  no token, or one that does not open this path
  Forbidden         403  a session's key where an admin token is needed, or an engine's path that is kept closed
  UnknownSession    404  a session that was never started
  SessionGone       410  the session was deleted
    SessionExpired       or was not used for too long
  BodyTooLarge      413  a body above --max-body
  Misdirected       421  a session that another process of this server holds
  ClientGone        499  the client closed its connection before the answer was ready
  UpstreamError     502  the engine did not answer, or its answer is not one that can be trained on
    RollbackFailed       the engine lost the prefix that it should have continued
    UpstreamTimeout 504  the engine took too long
    UpstreamUnproven 503 what a session needs was lost on the way to the engine or back when that was tried
  StoreError        503  the journal could not be written; the state is as it was
    StoreFull       507  because its disk is full
    QuotaExceeded   507  because --max-sessions or --max-total-bytes is reached
"""

from __future__ import annotations

from typing import Any

TOO_LONG = "(context_length_exceeded: this model's maximum context length is less than was asked for)"
"""What clients look for in the text of a ContextOverflow: litellm the sentence, LangChain the code."""


class StartupError(ValueError):
    """The server cannot start."""


class SessionError(Exception):
    """Base of the tree."""

    status = 500
    kind = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """Keep the request field that is at fault, if one is."""
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class BadRequest(SessionError):
    """A request that cannot be served."""

    status, kind, code = 400, "invalid_request_error", "bad_request"


class RoleNotAllowed(BadRequest):
    """A message of a role that may not be appended."""

    code = "role_not_allowed"


class ContextOverflow(BadRequest):
    """Longer than the engine's context; agents look for this code."""

    code = "context_length_exceeded"


class NotLinear(BadRequest):
    """Under --policy linear: neither an extension of the newest answer nor a rollback by one."""

    code = "not_linear"


class MatchFailed(BadRequest):
    """The function of --match failed on a message."""

    code = "match_failed"


class SessionTooLarge(BadRequest):
    """The session has reached --max-session-bytes; asking again does not help."""

    code = "session_too_large"


class KeyReused(BadRequest):
    """An Idempotency-Key that came with another body before."""

    status, code = 422, "idempotency_key_reused"


class Unauthorized(SessionError):
    """No token, or one that does not open this path."""

    status, kind, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(SessionError):
    """A session's key where an admin token is needed, or an engine's path that is kept closed."""

    status, kind, code = 403, "invalid_request_error", "permission_denied"


class UnknownSession(SessionError):
    """A session that was never started."""

    status, kind, code = 404, "invalid_request_error", "session_not_found"


class SessionGone(SessionError):
    """The session was deleted."""

    status, kind, code = 410, "invalid_request_error", "session_deleted"


class SessionExpired(SessionGone):
    """The session was not used for too long."""

    code = "session_expired"


class BodyTooLarge(SessionError):
    """A body above --max-body."""

    status, kind, code = 413, "invalid_request_error", "body_too_large"


class Misdirected(SessionError):
    """A session that another process of this server holds; only a request past the common port gets here."""

    status, kind, code = 421, "invalid_request_error", "misdirected_request"


class ClientGone(SessionError):
    """The client closed its connection before the answer was ready; nobody reads this answer."""

    status, kind, code = 499, "invalid_request_error", "client_closed_request"


class StoreError(SessionError):
    """The journal could not be written; the state is as it was."""

    status, kind, code = 503, "server_error", "store_unavailable"


class StoreFull(StoreError):
    """The journal's disk is full."""

    status, code = 507, "store_full"


class QuotaExceeded(StoreError):
    """As much is held as may be; it helps to delete sessions."""

    status, code = 507, "quota_exceeded"


class UpstreamError(SessionError):
    """The engine did not answer, or its answer is not one that can be trained on."""

    status, kind, code = 502, "upstream_error", "upstream_error"


class RollbackFailed(UpstreamError):
    """The engine lost the prefix that it should have continued; it may be asked once more, for everything."""


class UpstreamUnproven(UpstreamError):
    """The way to the engine loses what a session needs, or could not be tried yet."""

    status, code = 503, "upstream_unproven"


class UpstreamTimeout(UpstreamError):
    """The engine took too long."""

    status, code = 504, "upstream_timeout"
