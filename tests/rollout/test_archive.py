"""`pacenote sessions`: a journal from outside, also while a server writes it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pacenote.rollout.archive import Archive, parts
from pacenote.rollout.errors import StartupError
from pacenote.rollout.journal import Journal
from pacenote.rollout.journal_store import JournalStore
from pacenote.rollout.samples import decode_samples, encode_samples
from pacenote.rollout.sessions_cli import sessions_command
from pacenote.rollout.share import Share
from pacenote.rollout.store import open_store

if TYPE_CHECKING:
    from tests.rollout.conftest import Player

MakePlayer = Callable[..., "Player"]
USER = {"role": "user", "content": "a secret"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal"


@pytest.fixture
def store(path: Path) -> Iterator[JournalStore]:
    """A store that has it open all the while."""
    store = JournalStore(Journal(path))
    yield store
    asyncio.run(store.close())


@pytest.fixture
def player(store: JournalStore, new_player: MakePlayer) -> Player:
    """A session of two turns, the second of which supersedes the first; another session has been deleted."""
    player: Player = new_player(store=store)
    player.ask([USER], text="first")
    player.ask([USER], text="second")
    asyncio.run(store.delete("gone"))
    return player


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = sessions_command([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out + err


def test_listed(player: Player, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = player.session.id
    status, text = run(capsys, "list", f"sqlite:{path}")
    lines = text.splitlines()
    assert (status, len(lines)) == (0, 3)
    assert lines[1].split()[0] == id
    assert lines[2].startswith("1 sessions, 2 turns, ")
    status, text = run(capsys, "list", path, "--ended", "--json")
    ended, lives = sorted(map(json.loads, text.splitlines()), key=lambda entry: entry["turns"])
    assert (ended["id"], ended["reason"], ended["turns"], ended["bytes"]) == ("gone", "deleted", 0, 0)
    assert (lives["id"], lives["reason"], lives["turns"]) == (id, None, 2)
    assert lives["newest"] == player.turn.created


def test_shown_without_and_with_what_was_said(player: Player, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = player.session.id
    status, text = run(capsys, "show", path, id)
    assert (status, text.count("root")) == (0, 2)
    assert "superseded" in text
    assert "secret" not in text
    assert '{"role": "user", "content": "a secret"}' in run(capsys, "show", path, id, "--content")[1]
    shown = json.loads(run(capsys, "show", path, id, "--content", "--json")[1])
    assert shown["records"] == player.session.records()
    assert "secret" not in run(capsys, "show", path, id, "--json")[1]
    assert run(capsys, "show", path, "never")[0] == 2


def test_exported_as_the_server_gives_them(
    player: Player, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, "export", path, "--out", out) == (0, f"1 sessions in {out}\n")
    [file] = out.iterdir()
    assert file.name == f"{player.session.id}.safetensors"
    assert file.read_bytes() == encode_samples(player.session.trajectories())
    assert run(capsys, "export", path, player.session.id, "--superseded", "--out", out)[0] == 0
    assert [sample.status for sample in decode_samples(file.read_bytes())] == ["superseded", "length"]
    status, text = run(capsys, "export", path, "gone", "--out", out)
    assert (status, "no session gone lives" in text) == (2, True)


def test_backed_up_while_it_is_written(
    player: Player, store: JournalStore, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = player.session.records()
    status, text = run(capsys, "backup", path, tmp_path / "copy")
    assert (status, "read again whole" in text) == (0, True)
    player.ask([USER], text="third")
    copy = tmp_path / "copy" / "journal"
    assert copy.stat().st_mode & 0o077 == 0
    assert [file.name for file in copy.parent.iterdir()] == ["journal"]
    again = JournalStore(Journal(copy))
    found = again.find(player.session.id)
    assert found is not None
    assert found.records() == before
    asyncio.run(again.close())
    assert run(capsys, "backup", path, tmp_path / "copy")[0] == 2  # nothing is overwritten


def test_a_look_is_of_one_moment(player: Player, path: Path) -> None:
    with Archive(path) as archive:
        assert [entry.turns for entry in archive.entries() if not entry.reason] == [2]
        player.ask([USER], text="third")
        session = archive.session(player.session.id)
        assert session is not None
        assert len(session.turns) == 2


def test_damage_is_found(player: Player, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check", path) == (0, "1 sessions, 2 turns: all of it can be read\n")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE turn SET arrays = substr(arrays, 1, 40) WHERE number = 1")
        db.execute("INSERT INTO turn VALUES ('stray', 0, '{}', x'00')")
    db.close()
    status, text = run(capsys, "check", path)
    assert status == 1
    assert "session stray: turns of a session that does not live" in text
    assert f"turn 1 of session {player.session.id} cannot be read" in text
    assert text.endswith("2 problems\n")


def test_compacted_once_the_server_has_gone(
    new_player: MakePlayer, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = JournalStore(Journal(path))
    player = new_player(store=store)
    for number in range(30):
        player.ask([USER], [40 + i % 400 for i in range(400)], text=str(number))
    status, text = run(capsys, "compact", path)
    assert (status, "in use by another session server" in text) == (2, True)
    asyncio.run(store.delete(player.session.id))
    asyncio.run(store.close())
    size = path.stat().st_size
    status, text = run(capsys, "compact", path)
    assert status == 0
    assert path.stat().st_size < size / 4
    again = JournalStore(Journal(path))
    assert again.find("never") is None
    asyncio.run(again.close())


def test_a_server_of_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, ids = tmp_path / "j", []
    for index in range(3):
        store = open_store(f"sqlite:{path}", share=Share(index=index, count=3))
        ids.append(asyncio.run(store.create()).id)
        asyncio.run(store.close())
    assert parts(path) == [path, tmp_path / "j.1", tmp_path / "j.2"]
    text = run(capsys, "list", path)[1]
    assert all(id in text for id in ids)
    assert run(capsys, "show", path, ids[2])[0] == 0
    assert run(capsys, "check", path)[1].startswith("3 sessions, 0 turns")
    assert run(capsys, "backup", path, tmp_path / "copy")[0] == 0
    assert parts(tmp_path / "copy" / "j") == [tmp_path / "copy" / name for name in ("j", "j.1", "j.2")]
    (tmp_path / "j.1").unlink()
    status, text = run(capsys, "list", path)
    assert (status, "the journals of 3 processes; missing: " in text) == (2, True)


@pytest.mark.parametrize(
    ("content", "text"), [(None, "got no file"), (b"", "an empty file"), (b"x" * 4096, "file is not a database")]
)
def test_what_is_no_journal(
    tmp_path: Path, content: bytes | None, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal"
    if content is not None:
        path.write_bytes(content)
    for command in ("list", "check", "compact"):
        status, said = run(capsys, command, path)
        assert (status, text in said) == (2, True), said
    if content is not None:
        assert path.read_bytes() == content


def test_files_of_something_else(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE t(x)")
    db.close()
    with pytest.raises(StartupError, match="SQLite file of something else"):
        Archive(tmp_path / "other")


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = [(), ("list",), ("delete", "x"), ("export", "x")]
    assert [run(capsys, *words)[0] for words in calls] == [2, 2, 2, 2]
    assert run(capsys, "--help")[0] == 0
