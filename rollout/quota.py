"""How much a store may hold. What has been let in is finished: only what is new is refused."""

from __future__ import annotations

from dataclasses import dataclass

from pacenote.rollout.bounds import at_least_one
from pacenote.rollout.errors import QuotaExceeded, SessionTooLarge
from pacenote.rollout.session import Session
from pacenote.rollout.share import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Bounds on the sessions of a server; None: no bound.

    They are looked at when a session is asked for and when a chat comes in, not when its answer is kept: no generated
    token is thrown away. So what is in flight may go beyond them, by its own size.

    Attributes:
        sessions: that are held.
        total_bytes: of all held sessions' turns.
        session_bytes: of one session's turns.

    Raises:
        ValueError: a bound below 1.
    """

    sessions: int | None = None
    total_bytes: int | None = None
    session_bytes: int | None = None

    def __post_init__(self) -> None:
        at_least_one(max_sessions=self.sessions, max_total_bytes=self.total_bytes, max_session_bytes=self.session_bytes)

    def of(self, share: Share) -> Quota:
        """One process's part, rounded up."""
        sessions, total = (
            None if bound is None else -(-bound // share.count) for bound in (self.sessions, self.total_bytes)
        )
        return Quota(sessions=sessions, total_bytes=total, session_bytes=self.session_bytes)

    def admit_session(self, *, sessions: int, total_bytes: int) -> None:
        """Let another session in.

        Args:
            sessions, total_bytes: what is held.

        Raises:
            QuotaExceeded: no.
        """
        if self.sessions is not None and sessions >= self.sessions:
            raise QuotaExceeded(
                f"expected fewer than {self.sessions} sessions (--max-sessions), got {sessions}: collect and delete "
                "some, or set --session-ttl"
            )
        self._admit_bytes(total_bytes)

    def admit_turn(self, session: Session, *, total_bytes: int) -> None:
        """Let another chat in, in a session that is held.

        Args:
            session: its own.
            total_bytes: what is held.

        Raises:
            SessionTooLarge: the session has had its share.
            QuotaExceeded: all together have.
        """
        if self.session_bytes is not None and session.bytes >= self.session_bytes:
            raise SessionTooLarge(
                f"expected a session below {self.session_bytes} bytes (--max-session-bytes), got {session.bytes}: "
                "start another; what this one holds can be collected"
            )
        self._admit_bytes(total_bytes)

    def _admit_bytes(self, held: int) -> None:
        if self.total_bytes is not None and held >= self.total_bytes:
            raise QuotaExceeded(
                f"expected less than {self.total_bytes} bytes of turns (--max-total-bytes), got {held}: collect and "
                "delete sessions, or set --session-ttl"
            )


UNBOUNDED = Quota()
"""No bound."""
