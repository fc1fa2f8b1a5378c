"""Sessions in this process's memory: a `store.SessionStore` for tests, and what a journal is held beside."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Sequence

from pacenote.rollout.errors import BadRequest, Misdirected, SessionExpired, SessionGone
from pacenote.rollout.journal_file import DELETED, EXPIRED
from pacenote.rollout.quota import UNBOUNDED, Quota
from pacenote.rollout.session import Pending, Session
from pacenote.rollout.share import WHOLE, Share
from pacenote.rollout.turn import Answer, Turn

MAX_ID = 256


class MemoryStore:
    """A `SessionStore` in this process's memory.

    Args:
        remembered: how many ids that are gone are remembered; the oldest are forgotten beyond that.
        share: this process's part of all sessions; new ids are drawn from it.
        quota: how much may be held here.
        clock: seconds, for `expire`.
    """

    def __init__(
        self,
        *,
        remembered: int = 1_000_000,
        share: Share = WHOLE,
        quota: Quota = UNBOUNDED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sessions: dict[str, Session] = {}
        self._held = 0
        self._gone: dict[str, str] = {}  # id -> DELETED | EXPIRED, in order
        self._used: dict[str, float] = {}
        self._remembered = remembered
        self._share = share
        self._quota = quota
        self._clock = clock

    def __len__(self) -> int:
        """See `SessionStore.__len__`."""
        return len(self._sessions)

    def held(self) -> int:
        """See `SessionStore.held`."""
        return self._held

    def bytes(self) -> int | None:
        """See `SessionStore.bytes`."""
        return None

    async def create(self, session_id: str | None = None) -> Session:
        """See `SessionStore.create`."""
        session = self._named(session_id)
        if self.find(session.id) is None:
            self._hold(session)
        return session

    def find(self, session_id: str) -> Session | None:
        """See `SessionStore.find`."""
        if not self._share.holds(session_id):
            raise Misdirected(f"session {session_id} lives in another process of this server: ask the server's port")
        reason = self._gone.get(session_id)
        if reason == EXPIRED:
            raise SessionExpired(f"session {session_id} expired, unused too long: start another with POST /sessions")
        if reason is not None:
            raise SessionGone(f"session {session_id} was deleted: start another with POST /sessions")
        session = self._sessions.get(session_id)
        if session is not None:
            self._used[session_id] = self._clock()
        return session

    def open(self, session_id: str) -> Session:
        """See `SessionStore.open`."""
        session = self.find(session_id)
        if session is None:
            return self._admitted(session_id, recovered=True)
        self._quota.admit_turn(session, total_bytes=self._held)
        return session

    async def commit(
        self, session: Session, pending: Pending, *answers: Answer, id: str, created: float | None = None
    ) -> tuple[Turn, ...]:
        """See `SessionStore.commit`."""
        session = self._target(session)
        if session.abandoned(id):
            return ()
        return self._add(session, session.settle(pending), answers, id, created)

    def abandon(self, session: Session, id: str) -> None:
        """See `SessionStore.abandon`."""
        for one in (session, self._sessions.get(session.id, session)):
            one.abandon(id)

    async def delete(self, session_id: str) -> None:
        """See `SessionStore.delete`."""
        if len(session_id) <= MAX_ID:  # else nobody ever has it
            self._forget(session_id, DELETED)

    async def expire(self, idle: float, busy: Collection[str]) -> list[str]:
        """See `SessionStore.expire`."""
        expired = self._idle(idle, busy)
        for session_id in expired:
            self._forget(session_id, EXPIRED)
        return expired

    async def close(self) -> None:
        """See `SessionStore.close`."""

    def _named(self, session_id: str | None) -> Session:
        """The session of an id, or one that is not held yet; None draws an id."""
        known = None if session_id is None else self.find(session_id)
        return known or self._admitted(self._draw() if session_id is None else session_id)

    def _admitted(self, session_id: str, *, recovered: bool = False) -> Session:
        """A new session, if there is room for it."""
        if len(session_id) > MAX_ID:
            raise BadRequest(f"a session id has at most {MAX_ID} characters, got {len(session_id)}")
        self._quota.admit_session(sessions=len(self), total_bytes=self._held)
        return Session(session_id, recovered=recovered)

    def _draw(self) -> str:
        while not self._share.holds(session_id := uuid.uuid4().hex):
            pass
        return session_id

    def _hold(self, session: Session) -> None:
        self._sessions[session.id] = session
        self._held += session.bytes
        self._used[session.id] = self._clock()

    def _add(
        self, session: Session, pending: Pending, answers: Sequence[Answer], id: str, created: float | None
    ) -> tuple[Turn, ...]:
        """Commit to memory, and hold the session if nobody does.

        Raises:
            SessionGone: it was deleted meanwhile.
        """
        before = session.bytes
        turns = tuple(session.commit(pending, answer, id=id, created=created) for answer in answers)
        if self.find(session.id) is None:
            self._hold(session)
        else:
            self._held += session.bytes - before
        return turns

    def _target(self, session: Session) -> Session:
        """Where to commit to: the session itself; for a new one of an unknown id, whichever was first to be held."""
        held = self.find(session.id)
        if held is not session and (session.turns or not session.recovered):
            raise SessionGone(f"session {session.id} was deleted while it generated")
        return held or session

    def _forget(self, session_id: str, reason: str) -> None:
        if (session := self._sessions.pop(session_id, None)) is not None:
            self._held -= session.bytes
        self._used.pop(session_id, None)
        self._gone.setdefault(session_id, reason)
        while len(self._gone) > self._remembered:
            del self._gone[next(iter(self._gone))]

    def _idle(self, idle: float, busy: Collection[str]) -> list[str]:
        now = self._clock()
        self._used.update((session_id, now) for session_id in busy if session_id in self._sessions)
        return [session_id for session_id, used in self._used.items() if now - used >= idle]
