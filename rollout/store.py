"""Where sessions live: in memory, or in memory and a journal. The server knows the protocol."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

from pacenote.rollout.errors import BadRequest, Misdirected, SessionExpired, SessionGone, StartupError
from pacenote.rollout.journal import Journal
from pacenote.rollout.journal_file import DELETED, EXPIRED
from pacenote.rollout.quota import UNBOUNDED, Quota
from pacenote.rollout.session import Pending, Session
from pacenote.rollout.share import WHOLE, Share
from pacenote.rollout.turn import Answer, Turn

MAX_ID = 256
SQLITE = "sqlite:"
log = logging.getLogger(__name__)


class SessionStore(Protocol):
    """Sessions by id. An id that was deleted, or has expired, is never used again.

    What is awaited is kept for good once it returns. What raises has changed nothing.
    """

    async def create(self, session_id: str | None = None) -> Session:
        """A new session, under a new id or the one given; the session of that id, if there is one.

        Raises:
            StoreError: it cannot be kept.
            QuotaExceeded: as much is held as may be.
            SessionGone, Misdirected, BadRequest: as `open`.
        """
        ...

    def find(self, session_id: str) -> Session | None:
        """The session, or None if there never was one. Counts as use.

        Raises:
            SessionGone: it was deleted, or has expired.
            Misdirected: another process holds it.
        """
        ...

    def open(self, session_id: str) -> Session:
        """For a chat: the session, or a new one that is held, and shown, once something is committed to it.

        Counts as use.

        Raises:
            SessionGone: it was deleted, or has expired.
            Misdirected: another process holds it.
            BadRequest: the id is too long.
            QuotaExceeded, SessionTooLarge: as much is held as may be.
        """
        ...

    async def commit(
        self, session: Session, pending: Pending, *answers: Answer, id: str, created: float | None = None
    ) -> tuple[Turn, ...]:
        """`Session.commit` of each answer, all or none, kept for good. What was committed before stays as it was.

        Cancelling the caller does not stop it half way; what was abandoned before is not kept. A new session is held
        from now on; if another of its id came first, the turns are that one's.

        Raises:
            SessionGone: the session was deleted or has expired in the meantime.
            StoreError: it cannot be kept.
        """
        ...

    def abandon(self, session: Session, id: str) -> None:
        """Nobody gets the answers of a completion any more. If they are kept, the same request's next replace them."""
        ...

    async def delete(self, session_id: str) -> None:
        """Forget the session and refuse its id from now on. Deleting twice, or what never was, is fine.

        Raises:
            StoreError: it cannot be kept.
        """
        ...

    async def expire(self, idle: float, busy: Collection[str]) -> list[str]:
        """Forget sessions that nobody used for `idle` seconds; being `busy` now is use. Returns their ids."""
        ...

    def __len__(self) -> int:
        """Sessions that are held."""
        ...

    def held(self) -> int:
        """Bytes of their turns."""
        ...

    def bytes(self) -> int | None:
        """What they take on disk; None where they take nothing."""
        ...

    async def close(self) -> None:
        """Finish what was begun. Nothing is called after this."""
        ...


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


class JournalStore(MemoryStore):
    """A `SessionStore` whose sessions outlive the process. Everything is read at the start.

    Memory changes after the journal, in the journal's order, so a journal that cannot be written leaves both as they
    were.

    Args:
        journal: opened; closed by `close`.
        remembered, share, quota, clock: as `MemoryStore`.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        remembered: int = 1_000_000,
        share: Share = WHOLE,
        quota: Quota = UNBOUNDED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(remembered=remembered, share=share, quota=quota, clock=clock)
        self._journal = journal
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._begun: set[asyncio.Task[Any]] = set()
        self._gone.update(journal.gone(remembered))
        for session in journal.sessions():
            self._hold(session)

    async def create(self, session_id: str | None = None) -> Session:
        """See `SessionStore.create`."""
        session = self._named(session_id)
        async with self._lock(session.id):
            if held := self.find(session.id):
                return held
            await self._journal.start(session)
            self.find(session.id)  # raises if it has been deleted meanwhile
            self._hold(session)
        return session

    async def commit(
        self, session: Session, pending: Pending, *answers: Answer, id: str, created: float | None = None
    ) -> tuple[Turn, ...]:
        """See `SessionStore.commit`."""
        now = time.time() if created is None else created
        turns: tuple[Turn, ...] = await self._whole(self._commit(session, pending, answers, id, now))
        return turns

    async def delete(self, session_id: str) -> None:
        """See `SessionStore.delete`."""
        if len(session_id) <= MAX_ID:
            await self._whole(self._end(session_id, DELETED))

    async def expire(self, idle: float, busy: Collection[str]) -> list[str]:
        """See `SessionStore.expire`."""
        expired = self._idle(idle, busy)
        for session_id in expired:
            await self._whole(self._end(session_id, EXPIRED))
        return expired

    async def close(self) -> None:
        """See `SessionStore.close`."""
        while self._begun:
            await asyncio.wait(self._begun)
        await asyncio.to_thread(self._journal.close)

    def bytes(self) -> int | None:
        """See `SessionStore.bytes`."""
        return self._journal.bytes()

    async def _commit(
        self, session: Session, pending: Pending, answers: Sequence[Answer], id: str, created: float
    ) -> tuple[Turn, ...]:
        async with self._lock(session.id):
            session = self._target(session)
            if known := session.completion(id):
                return known
            if session.abandoned(id):
                return ()
            pending = session.settle(pending)
            await self._journal.append(session, pending, *answers, id=id, created=created)
            turns = self._add(session, pending, answers, id, created)
        self._target(session)
        return turns

    def _lock(self, session_id: str) -> asyncio.Lock:
        """Held while a session is made or added to: one after the other, in the journal as in memory."""
        return self._locks.setdefault(session_id, asyncio.Lock())

    async def _end(self, session_id: str, reason: str) -> None:
        """Refuse the id at once; take that back if it cannot be kept."""
        session, used = self._sessions.get(session_id), self._used.get(session_id, 0.0)
        if session_id in self._gone:
            return
        self._forget(session_id, reason)
        try:
            await self._journal.end(session_id, reason)
        except BaseException:
            self._gone.pop(session_id, None)
            if session is not None:
                self._hold(session)
                self._used[session_id] = used
            raise

    async def _whole(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Await work that goes on to its end even if the caller is cancelled."""
        task = asyncio.ensure_future(work)
        self._begun.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._begun.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.debug("a session's change was not kept", exc_info=task.exception())


def open_store(where: str, *, share: Share = WHOLE, subject: str = "", quota: Quota = UNBOUNDED) -> SessionStore:
    """The store of a `--store` value.

    Args:
        where: "memory", or "sqlite:PATH".
        share: this process's part of all sessions; each process has a file of its own, PATH, PATH.1, PATH.2 and so on.
        subject: what the tokens and rows in the journal mean; a journal of another subject is refused.
        quota: how much all processes together may hold.

    Raises:
        StartupError: the journal cannot be used.
        ValueError: no such store.
    """
    if where == "memory":
        return MemoryStore(share=share, quota=quota.of(share))
    path = check_store(where)
    assert path is not None
    if share.index:
        path = path.with_name(f"{path.name}.{share.index}")
    journal = Journal(path, subject=subject, share=share)
    try:
        return JournalStore(journal, share=share, quota=quota.of(share))
    except StartupError:
        journal.close()
        raise


def check_store(where: str) -> Path | None:
    """The journal's path of a `--store` value, None for memory.

    Raises:
        ValueError: neither "memory" nor "sqlite:PATH".
    """
    path = where.removeprefix(SQLITE)
    if where == "memory":
        return None
    if path in (where, "", ":memory:"):
        raise ValueError(f"expected a store of memory or sqlite:PATH, got {where!r}")
    return Path(path)
