"""The journal: an append-only SQLite file of sessions and turns, written by one thread.

Writes that wait together share one transaction, so a turn costs a fraction of a disk flush. `synchronous=FULL`: a
committed turn survives a loss of power, not only of the process. Turns are never changed; a session that ends loses
its turns and leaves its id.

    session(id, created, recovered, ended, reason)    reason is null while it lives, else "deleted" or "expired"
    turn(session, number, head, arrays)               see `journal_entry`
    meta(name, value)                                 subject, share
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from safetensors import SafetensorError

from pacenote.rollout.errors import SessionError, StartupError, StoreError, StoreFull
from pacenote.rollout.journal_entry import pack_turn, unpack_turn
from pacenote.rollout.session import Pending, Session
from pacenote.rollout.share import WHOLE, Share
from pacenote.rollout.turn import Answer

DELETED, EXPIRED = "deleted", "expired"
APPLICATION = 0x50434E54  # "PCNT", in the file's header
FORMAT = 1
BATCH = 256  # writes in one transaction
Write = Callable[[sqlite3.Connection], object]
_TABLES = (
    "CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE session(id TEXT PRIMARY KEY, created REAL NOT NULL, recovered INTEGER NOT NULL, ended REAL, "
    "reason TEXT) WITHOUT ROWID",
    "CREATE TABLE turn(session TEXT NOT NULL, number INTEGER NOT NULL, head TEXT NOT NULL, arrays BLOB NOT NULL, "
    "UNIQUE(session, number))",
)


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
        self._lock = _hold(path)
        try:
            self._db = _connect(path)
            _prepare(self._db, path, {"subject": subject, "share": f"{share.index} of {share.count}"})
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
        found: list[tuple[str, float, int]] = []
        order = "SELECT id, created, recovered FROM session WHERE reason IS NULL ORDER BY created, id"
        self._now(lambda db: found.extend(db.execute(order)))
        for id, created, recovered in found:
            session = Session(id, recovered=bool(recovered))
            session.created = created
            self._now(lambda db, session=session: _read(db, session))  # type: ignore[misc]
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


def _hold(path: Path) -> int:
    """An open, locked descriptor of a file beside it: closing one of SQLite's own would drop SQLite's locks."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"cannot make {lock}: {error.strerror}; choose another --store") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StartupError(f"{path} is in use by another session server: stop it, or choose another --store") from error
    return descriptor


def _connect(path: Path) -> sqlite3.Connection:
    with contextlib.suppress(OSError):  # SQLite says better what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)


def _prepare(db: sqlite3.Connection, path: Path, meta: dict[str, str]) -> None:
    """Make the tables of a new file, or check those of an old one."""
    [[application]] = db.execute("PRAGMA application_id")
    [[tables]] = db.execute("SELECT count(*) FROM sqlite_schema")
    if tables and application != APPLICATION:
        raise StartupError(f"{path} is a SQLite file of something else: choose another --store")
    [[mode]] = db.execute("PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise StartupError(f"{path} cannot have a write-ahead log here (journal mode {mode}): choose a local disk")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    if not tables:
        db.execute("BEGIN")
        for statement in (*_TABLES, f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {FORMAT}"):
            db.execute(statement)
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        db.execute("COMMIT")
    [[version]] = db.execute("PRAGMA user_version")
    if version != FORMAT:
        raise StartupError(f"{path} is a journal of format {version}, and this version reads format {FORMAT}")
    found = dict(db.execute("SELECT name, value FROM meta"))
    if found.get("share") != meta["share"]:
        raise StartupError(
            f"{path} belongs to process {found.get('share')}, not {meta['share']}: keep --workers, or choose another "
            "--store"
        )
    if found.get("subject") != meta["subject"]:
        raise StartupError(
            f"{path} was written with another tokenizer, routing or --match: expected {found.get('subject')}, got "
            f"{meta['subject']}; choose another --store"
        )


def _start(db: sqlite3.Connection, session: Session) -> None:
    values = (session.id, session.created, int(session.recovered))
    db.execute("INSERT OR IGNORE INTO session VALUES (?, ?, ?, NULL, NULL)", values)


def _read(db: sqlite3.Connection, session: Session) -> None:
    """Commit a session's turns again."""
    rows = db.execute("SELECT number, head, arrays FROM turn WHERE session = ? ORDER BY number", (session.id,))
    for number, head, arrays in rows:
        try:
            pending, answer, id, created = unpack_turn(head, arrays, session.turns)
            if number != len(session.turns):
                raise ValueError(f"expected number {len(session.turns)}")
        except (KeyError, IndexError, TypeError, ValueError, SessionError, SafetensorError) as error:
            raise StartupError(f"turn {number} of session {session.id} cannot be read: {error!r}") from error
        session.commit(pending, answer, id=id, created=created)


def _store_error(error: sqlite3.Error) -> StoreError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return StoreFull("the journal's disk is full; nothing has changed: free space, or delete sessions")
    return StoreError(f"the journal cannot be written ({error}); nothing has changed")
