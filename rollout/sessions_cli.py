"""`pacenote sessions`: what a session server's journal holds, from the command line. See docs/operations.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pacenote.rollout.archive import Archive, Entry, compact, parts
from pacenote.rollout.errors import StartupError
from pacenote.rollout.samples import encode_samples
from pacenote.rollout.session import Session
from pacenote.rollout.store import SQLITE

_COLUMNS = ("id", "created", "newest turn", "turns", "bytes", "state")


def sessions_command(words: Sequence[str]) -> int:
    """Run `pacenote sessions ...`; returns the exit status: 0 done, 1 something is damaged or missing, 2 usage."""
    try:
        asked = _parser().parse_args(words)
    except SystemExit as end:
        return int(end.code or 0)
    commands: dict[str, Callable[[argparse.Namespace, list[Path]], int]] = {
        "list": _list,
        "show": _show,
        "export": _export,
        "check": _check,
        "backup": _backup,
        "compact": _compact,
    }
    try:
        return commands[asked.command](asked, parts(Path(asked.store.removeprefix(SQLITE))))
    except StartupError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(f"cannot write {error.filename}: {error.strerror}", 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pacenote sessions",
        description="Look into a session server's journal, check it, copy it; the server may run, but for compact.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> Callable[..., argparse.Action]:
        made = commands.add_parser(name, help=about, description=about)
        made.add_argument("store", help="the value of --store: sqlite:PATH, or PATH")
        return made.add_argument

    add = command("list", "Sessions, oldest first.")
    add("--ended", action="store_true", help="those that were deleted or have expired, too")
    add("--json", action="store_true", help="one JSON object a line")
    add = command("show", "The turns of a session.")
    add("id", help="of the session")
    add("--content", action="store_true", help="what was said, too")
    add("--json", action="store_true", help="as JSON")
    add = command("export", "Write sessions' samples, as POST /sessions/{id}/samples gives them: DIR/ID.safetensors.")
    add("ids", nargs="*", metavar="ID", help="of sessions; all that live if left out")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the files; made if it is not there")
    add("--superseded", action="store_true", help="superseded answers, too")
    command("check", "Read everything; exit status 1 if something is damaged.")
    add = command("backup", "Copy the journal to a folder, while a server writes it.")
    add("dir", type=Path, help="folder for the copy; made if it is not there")
    command("compact", "Give the space of ended sessions back to the disk; the server must be stopped.")
    return parser


def _list(asked: argparse.Namespace, files: list[Path]) -> int:
    entries = []
    for file in files:
        with Archive(file) as archive:
            entries += [entry for entry in archive.entries() if asked.ended or entry.reason is None]
    if asked.json:
        for entry in entries:
            print(json.dumps(asdict(entry)))
        return 0
    rows = [_COLUMNS, *(_cells(entry) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    turns, size = sum(entry.turns for entry in entries), sum(entry.bytes for entry in entries)
    print(f"{len(entries)} sessions, {turns} turns, {size} bytes; {sum(f.stat().st_size for f in files)} on disk")
    return 0


def _cells(entry: Entry) -> tuple[str, ...]:
    state = entry.reason or ("started by a chat" if entry.recovered else "")
    newest = "" if entry.newest is None else _time(entry.newest)
    return entry.id, _time(entry.created), newest, str(entry.turns), str(entry.bytes), state


def _show(asked: argparse.Namespace, files: list[Path]) -> int:
    with ExitStack() as stack:
        session = _found(asked.id, [stack.enter_context(Archive(file)) for file in files])
    records = session.records()
    if not asked.content:
        records = [{k: v for k, v in record.items() if k not in ("messages", "response")} for record in records]
    if asked.json:
        print(json.dumps({"session_id": session.id, "created": session.created, "records": records}, indent=2))
        return 0
    print(f"session {session.id}, {_time(session.created)}, {len(records)} turns, {session.bytes} bytes")
    for record in records:
        print(_turn(record))
        for message in (*record.get("messages", ()), *([record["response"]] if "response" in record else [])):
            print(f"    {json.dumps(message, ensure_ascii=False)}")
    return 0


def _turn(record: dict[str, Any]) -> str:
    after = "root" if record["parent"] is None else f"after {record['parent']}"
    note = f"; {record['note']}" if record["note"] else ""
    return (
        f"  {record['index']:>4}  {after:<10}  {_time(record['created'])}  prompt {record['prompt_tokens']}, generated "
        f"{record['completion_tokens']} ({record['finish_reason']}), weights {record['weight_version']}, "
        f"{record['status']}{note}"
    )


def _export(asked: argparse.Namespace, files: list[Path]) -> int:
    with ExitStack() as stack:
        archives = [stack.enter_context(Archive(file)) for file in files]
        ids = asked.ids or [entry.id for one in archives for entry in one.entries() if entry.reason is None]
        asked.out.mkdir(parents=True, exist_ok=True)
        for id in ids:
            session = _found(id, archives)
            path = asked.out / f"{quote(id, safe='')}.safetensors"
            path.write_bytes(encode_samples(session.trajectories(include_superseded=asked.superseded)))
    print(f"{len(ids)} sessions in {asked.out}")
    return 0


def _check(asked: argparse.Namespace, files: list[Path]) -> int:
    problems, turns, sessions = 0, 0, 0
    for file in files:
        with Archive(file) as archive:
            for text in archive.check():
                print(f"{file}: {text}")
                problems += 1
            living = [entry for entry in archive.entries() if entry.reason is None]
            sessions, turns = sessions + len(living), turns + sum(entry.turns for entry in living)
    print(f"{sessions} sessions, {turns} turns: {f'{problems} problems' if problems else 'all of it can be read'}")
    return int(bool(problems))


def _backup(asked: argparse.Namespace, files: list[Path]) -> int:
    asked.dir.mkdir(parents=True, exist_ok=True)
    problems = 0
    for file in files:
        target = asked.dir / file.name
        with Archive(file) as archive:
            archive.backup(target)
        with Archive(target) as copy:
            for text in copy.check():
                print(f"{target}: {text}")
                problems += 1
        print(f"{file} -> {target}, {target.stat().st_size} bytes{'' if problems else ', read again whole'}")
    return int(bool(problems))


def _compact(asked: argparse.Namespace, files: list[Path]) -> int:
    for file in files:
        before, after = compact(file)
        print(f"{file}: {before} -> {after} bytes")
    return 0


def _found(session_id: str, archives: Sequence[Archive]) -> Session:
    for archive in archives:
        session = archive.session(session_id)
        if session is not None:
            return session
    raise StartupError(
        f"no session {session_id} lives in {archives[0].path}: `pacenote sessions list --ended` shows those there were"
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _fail(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
