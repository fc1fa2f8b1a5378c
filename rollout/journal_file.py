"""A journal's file: its tables, who may use it, how sessions are read from it. See `journal` for how it is written.

session(id, created, recovered, ended, reason)    reason is null while it lives, else "deleted" or "expired"
turn(session, number, head, arrays)               see `journal_entry`
meta(name, value)                                 subject, share
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from pathlib import Path

from safetensors import SafetensorError

from pacenote.rollout.errors import SessionError, StartupError
from pacenote.rollout.journal_entry import unpack_turn
from pacenote.rollout.session import Session

DELETED, EXPIRED = "deleted", "expired"
APPLICATION = 0x50434E54  # "PCNT", in the file's header
FORMAT = 1
_TABLES = (
    "CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE session(id TEXT PRIMARY KEY, created REAL NOT NULL, recovered INTEGER NOT NULL, ended REAL, "
    "reason TEXT) WITHOUT ROWID",
    "CREATE TABLE turn(session TEXT NOT NULL, number INTEGER NOT NULL, head TEXT NOT NULL, arrays BLOB NOT NULL, "
    "UNIQUE(session, number))",
)


def hold(path: Path) -> int:
    """Be the only process that writes a journal, until the descriptor returned is closed.

    It is of a file beside the journal: closing one of SQLite's own would drop SQLite's locks.

    Raises:
        StartupError: another process is, or the file cannot be made.
    """
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


def connect(path: Path) -> sqlite3.Connection:
    """A connection for any thread, without transactions of its own; makes the file."""
    with contextlib.suppress(OSError):  # SQLite says better what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)


def prepare(db: sqlite3.Connection, path: Path, meta: dict[str, str]) -> None:
    """Make the tables of a new file, or check those of an old one.

    Args:
        db: from `connect`.
        path: for messages.
        meta: subject and share, see `journal.Journal`.

    Raises:
        StartupError: the file is something else's, of another format, subject or share.
    """
    new = not check_kind(db, path)
    [[mode]] = db.execute("PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise StartupError(f"{path} cannot have a write-ahead log here (journal mode {mode}): choose a local disk")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    if new:
        db.execute("BEGIN")
        for statement in (*_TABLES, f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {FORMAT}"):
            db.execute(statement)
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        db.execute("COMMIT")
    check_format(db, path)
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


def check_kind(db: sqlite3.Connection, path: Path) -> bool:
    """Whether it has tables.

    Raises:
        StartupError: they are not a journal's.
    """
    [[application]] = db.execute("PRAGMA application_id")
    [[tables]] = db.execute("SELECT count(*) FROM sqlite_schema")
    if tables and application != APPLICATION:
        raise StartupError(f"{path} is a SQLite file of something else: choose another --store")
    return bool(tables)


def check_format(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a journal of another version's format.

    Raises:
        StartupError: it is one.
    """
    [[version]] = db.execute("PRAGMA user_version")
    if version != FORMAT:
        raise StartupError(f"{path} is a journal of format {version}, and this version reads format {FORMAT}")


def living(db: sqlite3.Connection, session_id: str | None = None) -> list[Session]:
    """Sessions that live, oldest first, without their turns; only that of an id, if one is given."""
    found = []
    which, given = ("", ()) if session_id is None else ("AND id = ?", (session_id,))
    order = f"SELECT id, created, recovered FROM session WHERE reason IS NULL {which} ORDER BY created, id"
    for id, created, recovered in db.execute(order, given):
        session = Session(id, recovered=bool(recovered))
        session.created = created
        found.append(session)
    return found


def read_turns(db: sqlite3.Connection, session: Session) -> None:
    """Commit a session's turns again.

    Raises:
        StartupError: a turn that cannot be read.
    """
    rows = db.execute("SELECT number, head, arrays FROM turn WHERE session = ? ORDER BY number", (session.id,))
    for number, head, arrays in rows:
        try:
            pending, answer, id, created = unpack_turn(head, arrays, session.turns)
            if number != len(session.turns):
                raise ValueError(f"expected number {len(session.turns)}")
        except (KeyError, IndexError, TypeError, ValueError, SessionError, SafetensorError) as error:
            raise StartupError(f"turn {number} of session {session.id} cannot be read: {error!r}") from error
        session.commit(pending, answer, id=id, created=created)
