"""Where sessions live: in memory, or in memory and a journal. The server knows the protocol."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from pacenote.rollout.errors import StartupError
from pacenote.rollout.journal import Journal
from pacenote.rollout.journal_store import JournalStore
from pacenote.rollout.memory_store import MemoryStore
from pacenote.rollout.quota import UNBOUNDED, Quota
from pacenote.rollout.session import Pending, Session
from pacenote.rollout.share import WHOLE, Share
from pacenote.rollout.turn import Answer, Turn

SQLITE = "sqlite:"


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
