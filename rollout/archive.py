"""A journal's file from outside: looked into, checked, copied while a server writes it, or made smaller.

Nothing here writes to a journal but `compact`, which needs the server to be stopped.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pacenote.rollout.errors import StartupError
from pacenote.rollout.journal_file import check_format, check_kind, hold, living, read_turns
from pacenote.rollout.session import Session

_ENTRIES = (
    "SELECT id, created, recovered, ended, reason, count(number), total(length(head) + length(arrays)), "
    "max(json_extract(head, '$.created')) FROM session LEFT JOIN turn ON turn.session = session.id "
    "GROUP BY id ORDER BY session.created, id"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A session in a journal, without its turns.

    Attributes:
        id: as in the URL.
        created, newest, ended: seconds since the epoch: of the session, of its newest turn, of its end; None: not yet.
        recovered: it was started by a chat.
        reason: "deleted" or "expired"; None while it lives.
        turns, bytes: how many, and what they take in the file; none are left of a session that has ended.
    """

    id: str
    created: float
    recovered: bool
    ended: float | None
    reason: str | None
    turns: int
    bytes: int
    newest: float | None


class Archive:
    """One journal's file, opened for reading; close it with `close`, or use it as a context.

    What is read is the state of one moment, whatever a server commits meanwhile.

    Args:
        path: of the journal.

    Raises:
        StartupError: no such file, or no journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise StartupError(f"expected a journal, got no file {path}")
        try:
            self._db = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None, timeout=10.0)
            self._db.execute("BEGIN")
            if not check_kind(self._db, path):
                raise StartupError(f"expected a journal, got {path}, an empty file")
            check_format(self._db, path)
        except sqlite3.Error as error:
            raise StartupError(f"expected a journal, got {path}: {error}") from error

    def __enter__(self) -> Archive:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def meta(self) -> dict[str, str]:
        """What it belongs to: `subject` (tokenizer, routing, match) and `share` (which process of how many)."""
        return dict(self._db.execute("SELECT name, value FROM meta"))

    def entries(self) -> list[Entry]:
        """All sessions, oldest first, those that have ended too."""
        return [
            Entry(
                id=id, created=created, recovered=bool(recovered), ended=ended, reason=reason, turns=turns,
                bytes=int(size), newest=newest,
            )
            for id, created, recovered, ended, reason, turns, size, newest in self._db.execute(_ENTRIES)
        ]  # fmt: skip

    def session(self, session_id: str) -> Session | None:
        """A session that lives, whole; None: there is none of this id.

        Raises:
            StartupError: it cannot be read.
        """
        for session in living(self._db, session_id):
            read_turns(self._db, session)
            return session
        return None

    def check(self) -> Iterator[str]:
        """What is wrong with it: of the file, of turns without a session, of each session that cannot be read."""
        for (text,) in self._db.execute("PRAGMA integrity_check"):
            if text != "ok":
                yield f"the file: {text}"
        strays = "SELECT DISTINCT session FROM turn WHERE session NOT IN (SELECT id FROM session WHERE reason IS NULL)"
        for (id,) in self._db.execute(strays):
            yield f"session {id}: turns of a session that does not live"
        for session in living(self._db):
            try:
                read_turns(self._db, session)
                session.trajectories(include_superseded=True)  # which check themselves
            except (StartupError, ValueError) as error:
                yield str(error)

    def backup(self, target: Path) -> None:
        """Copy it; what a server commits from now on is not in the copy. The copy appears when it is whole and flushed.

        Raises:
            StartupError: the target exists, or cannot be written.
        """
        if target.exists():
            raise StartupError(f"expected a file that does not exist yet, got {target}")
        part = target.with_name(f"{target.name}.part")
        part.unlink(missing_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(part)) as copy:
                self._db.execute("COMMIT")  # a backup brings its own
                self._db.backup(copy, pages=1024)
                self._db.execute("BEGIN")
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.chmod(0o600)
            part.rename(target)
        except (OSError, sqlite3.Error) as error:
            raise StartupError(f"cannot write {target}: {error}") from error


def compact(path: Path) -> tuple[int, int]:
    """Give the space of sessions that have ended back to the disk; returns bytes before and after.

    Raises:
        StartupError: a server has the journal, or it is none, or the disk has no room for a copy.
    """
    Archive(path).close()
    before = path.stat().st_size
    lock = hold(path)
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        raise StartupError(f"cannot compact {path}: {error}; it is as it was") from error
    finally:
        os.close(lock)
    return before, path.stat().st_size


def parts(path: Path) -> list[Path]:
    """The files of a store: PATH, and PATH.1, PATH.2 and so on of a server with several processes.

    Raises:
        StartupError: one is missing, or none is there.
    """
    with Archive(path) as first:
        share = first.meta().get("share", "0 of 1")
    count = int(share.rpartition(" ")[2])
    files = [path, *(path.with_name(f"{path.name}.{index}") for index in range(1, count))]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise StartupError(f"expected {count} files, the journals of {count} processes; missing: {', '.join(missing)}")
    return files
