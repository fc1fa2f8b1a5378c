"""Sessions in memory and a journal: a `store.SessionStore` that outlives the process."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from pacenote.rollout.journal import Journal
from pacenote.rollout.journal_file import DELETED, EXPIRED
from pacenote.rollout.memory_store import MAX_ID, MemoryStore
from pacenote.rollout.quota import UNBOUNDED, Quota
from pacenote.rollout.session import Pending, Session
from pacenote.rollout.share import WHOLE, Share
from pacenote.rollout.turn import Answer, Turn

log = logging.getLogger(__name__)


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
