"""Where sessions live. The server knows the protocol; memory is the first place."""

from __future__ import annotations

import uuid
from typing import Protocol

from pacenote.rollout.errors import BadRequest, SessionGone
from pacenote.rollout.session import Session

MAX_ID = 256


class SessionStore(Protocol):
    """Sessions by id. A deleted id is never used again."""

    def create(self) -> Session:
        """A new session under a new id."""
        ...

    def find(self, session_id: str) -> Session | None:
        """The session, or None if there never was one.

        Raises:
            SessionGone: it was deleted.
        """
        ...

    def open(self, session_id: str) -> Session:
        """The session, started now if there never was one.

        Raises:
            SessionGone: it was deleted.
            BadRequest: the id is too long.
        """
        ...

    def delete(self, session_id: str) -> None:
        """Forget the session and refuse its id from now on. Deleting twice, or what never was, is fine."""
        ...


class MemoryStore:
    """A `SessionStore` in this process's memory.

    Args:
        remembered: how many deleted ids are remembered; the oldest are forgotten beyond that.
    """

    def __init__(self, *, remembered: int = 1_000_000) -> None:
        self._sessions: dict[str, Session] = {}
        self._deleted: dict[str, None] = {}  # in order of deletion
        self._remembered = remembered

    def __len__(self) -> int:
        """Sessions that are held."""
        return len(self._sessions)

    def create(self) -> Session:
        """See `SessionStore.create`."""
        session = Session(uuid.uuid4().hex)
        self._sessions[session.id] = session
        return session

    def find(self, session_id: str) -> Session | None:
        """See `SessionStore.find`."""
        if session_id in self._deleted:
            raise SessionGone(f"session {session_id} was deleted: start another with POST /sessions")
        return self._sessions.get(session_id)

    def open(self, session_id: str) -> Session:
        """See `SessionStore.open`."""
        session = self.find(session_id)
        if session is None:
            if len(session_id) > MAX_ID:
                raise BadRequest(f"a session id has at most {MAX_ID} characters, got {len(session_id)}")
            session = self._sessions[session_id] = Session(session_id, recovered=True)
        return session

    def delete(self, session_id: str) -> None:
        """See `SessionStore.delete`."""
        self._sessions.pop(session_id, None)
        self._deleted[session_id[:MAX_ID]] = None
        while len(self._deleted) > self._remembered:
            del self._deleted[next(iter(self._deleted))]
