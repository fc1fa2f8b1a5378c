"""The journal: an append-only SQLite file of sessions and turns, written by one thread.

Writes that wait together share one transaction, so a turn costs a fraction of a disk flush. `synchronous=FULL`: a
committed turn survives a loss of power, not only of the process. Turns are never changed; a session that ends loses
its turns and leaves its id.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from pacenote.rollout.errors import SessionError, StartupError, StoreError, StoreFull
from pacenote.rollout.journal_entry import pack_turn
from pacenote.rollout.journal_file import connect, hold, living, prepare, read_turns
from pacenote.rollout.session import Pending, Session
from pacenote.rollout.share import WHOLE, Share
from pacenote.rollout.turn import Answer

BATCH = 256  # writes in one transaction
Write = Callable[[sqlite3.Connection], object]


class Journal:
    """One file, held by one process.

    Args:
        path: made if it is not there; its folder must be.
        subject: what tokens and rows in it mean; a file of another subject is refused.
        share: the process's part of all sessions; a file of another part is refused.

    Raises:
        StartupError: the file is in use, is no journal, or not one of this server.
    """

    def __init__(self, path: Path, *, subject: str = "", share: Share = WHOLE) -> None:
        self.path = path
        self._lock = hold(path)
        try:
            self._db = connect(path)
            prepare(self._db, path, {"subject": subject, "share": f"{share.index} of {share.count}"})
        except sqlite3.Error as error:
            os.close(self._lock)
            raise StartupError(f"cannot use {path} as a journal: {error}") from error
        except StartupError:
            os.close(self._lock)
            raise
        self._queue: queue.SimpleQueue[tuple[Write, Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def gone(self, limit: int) -> dict[str, str]:
        """Ids that have ended, with the reason, oldest first. Those before the last `limit` are forgotten for good."""
        oldest = "SELECT id FROM session WHERE reason IS NOT NULL ORDER BY ended DESC, id LIMIT -1 OFFSET ?"
        self._now(lambda db: db.execute(f"DELETE FROM session WHERE id IN ({oldest})", (limit,)))
        found: list[tuple[str, str]] = []
        order = "SELECT id, reason FROM session WHERE reason IS NOT NULL ORDER BY ended, id"
        self._now(lambda db: found.extend(db.execute(order)))
        return dict(found)

    def sessions(self) -> Iterator[Session]:
        """All sessions that live, as they were.

        Raises:
            StartupError: a turn that cannot be read.
        """
        found: list[Session] = []
        self._now(lambda db: found.extend(living(db)))
        for session in found:
            self._now(partial(read_turns, session=session))
            yield session

    async def start(self, session: Session) -> None:
        """Keep a new session.

        Raises:
            StoreError: it could not be written.
        """
        await self._write(lambda db: _start(db, session))

    async def append(self, session: Session, pending: Pending, *answers: Answer, id: str, created: float) -> None:
        """Keep a session's next turns, the choices of one completion, and the session if it is new.

        All of them are kept, or none. Await each call before the session's next.

        Raises:
            StoreError: it could not be written.
        """
        number = len(session.turns)

        def write(db: sqlite3.Connection) -> None:
            try:
                packed = [pack_turn(pending, answer, id=id, created=created) for answer in answers]
            except TypeError as error:
                raise StoreError(f"the turn cannot be kept: {error}") from error
            _start(db, session)
            rows = [(session.id, number + place, *turn) for place, turn in enumerate(packed)]
            db.executemany("INSERT INTO turn VALUES (?, ?, ?, ?)", rows)

        await self._write(write)

    async def end(self, session_id: str, reason: str) -> None:
        """Drop a session's turns and keep its id as ended, also one that never was.

        Raises:
            StoreError: it could not be written.
        """

        def write(db: sqlite3.Connection) -> None:
            now = time.time()
            db.execute("DELETE FROM turn WHERE session = ?", (session_id,))
            db.execute("INSERT OR IGNORE INTO session VALUES (?, ?, 0, NULL, NULL)", (session_id, now))
            db.execute("UPDATE session SET ended = ?, reason = ? WHERE id = ?", (now, reason, session_id))

        await self._write(write)

    def bytes(self) -> int:
        """What it takes on disk, with its write-ahead log."""
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        """Write what waits, then let go of the file. Closing twice is fine."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            os.close(self._lock)

    async def _write(self, write: Write) -> None:
        await asyncio.wrap_future(self._submit(write))

    def _now(self, write: Write) -> None:
        try:
            self._submit(write).result()
        except StoreError as error:
            raise StartupError(f"{self.path}: {error}") from error

    def _submit(self, write: Write) -> Future[None]:
        if not self._thread.is_alive():
            raise StoreError("the journal is closed")
        future: Future[None] = Future()
        self._queue.put((write, future))
        return future

    def _run(self) -> None:
        with contextlib.closing(self._db):
            while (first := self._queue.get()) is not None:
                jobs, last = [first], False
                while len(jobs) < BATCH and not last:
                    try:
                        job = self._queue.get_nowait()
                    except queue.Empty:
                        break
                    last = job is None
                    jobs += [] if job is None else [job]
                # Once it runs it cannot be cancelled any more; before, nobody waits for it.
                self._transact([job for job in jobs if job[1].set_running_or_notify_cancel()])
                if last:
                    return

    def _transact(self, jobs: list[tuple[Write, Future[None]]]) -> None:
        """Run writes in one transaction; if it fails, each in one of its own: none fails for another's sake."""
        failures: dict[int, BaseException] = {}
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for place, (write, _) in enumerate(jobs):
                try:
                    write(self._db)
                except (SessionError, StartupError) as error:  # raised before anything was written
                    failures[place] = error
            self._db.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            if len(jobs) > 1:
                for job in jobs:
                    self._transact([job])
                return
            failures[0] = _store_error(error) if isinstance(error, sqlite3.Error) else error
        for place, (_, future) in enumerate(jobs):
            if place in failures:
                future.set_exception(failures[place])
            else:
                future.set_result(None)


def _start(db: sqlite3.Connection, session: Session) -> None:
    values = (session.id, session.created, int(session.recovered))
    db.execute("INSERT OR IGNORE INTO session VALUES (?, ?, ?, NULL, NULL)", values)


def _store_error(error: sqlite3.Error) -> StoreError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return StoreFull("the journal's disk is full; nothing has changed: free space, or delete sessions")
    return StoreError(f"the journal cannot be written ({error}); nothing has changed")
