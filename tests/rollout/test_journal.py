"""The journal: what was committed is there again, bit for bit, and what cannot be written changes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.errors import SessionExpired, SessionGone, StartupError, StoreError, StoreFull
from pacenote.rollout.journal import Journal
from pacenote.rollout.journal_entry import pack_turn, unpack_turn
from pacenote.rollout.journal_store import JournalStore
from pacenote.rollout.matching import Match
from pacenote.rollout.messages import Message, parse_message, parse_messages
from pacenote.rollout.samples import encode_samples
from pacenote.rollout.session import Pending, Session
from pacenote.rollout.share import Share
from pacenote.rollout.store import open_store
from pacenote.rollout.turn import Answer, Prompt, Render

if TYPE_CHECKING:
    from tests.rollout.conftest import Player

MakePlayer = Callable[..., "Player"]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal"


@pytest.fixture
def store(path: Path) -> Iterator[JournalStore]:
    """A store on it."""
    store = JournalStore(Journal(path))
    yield store
    asyncio.run(store.close())


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def outside(session: Session) -> tuple[Any, ...]:
    """All that can be seen of a session from outside, and the dtypes."""
    arrays = [
        (array.dtype, array.shape)
        for turn in session.turns
        for array in (turn.prompt.ids, turn.answer.ids, turn.answer.logprobs, turn.answer.versions)
    ]
    return (
        session.id,
        session.created,
        session.recovered,
        session.records(),
        session.accumulated_token_ids(),
        [encode_samples(session.trajectories(include_superseded=every)) for every in (False, True)],
        arrays,
    )


def again(path: Path, *ids: str) -> list[Session | None]:
    """These sessions as a new process finds them."""
    store = JournalStore(Journal(path))
    found = [store.find(id) for id in ids]
    asyncio.run(store.close())
    return found


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),  # which answer is gone on from; none if there are not so many
            st.sampled_from(["a", "b"]),
            st.sampled_from([None, "user", "observation", "end", "text"]),
            st.integers(0, 2),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_tree_is_there_again(new_player: MakePlayer, plan: list[tuple[int, str, str | None, int, bool]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        store = JournalStore(Journal(path))
        player = new_player(store=store)
        histories: list[list[dict[str, Any]]] = []
        for parent, text, stop, version, tools in plan:
            messages = [*(histories[parent] if parent < len(histories) else []), user(text)]
            request = {"tools": TOOLS, "reasoning_effort": "low"} if tools else None
            reply = player.ask(messages, [40 + version, 41], stop=stop, version=version, text=text, request=request)
            histories.append([*messages, reply])
        session = player.session
        player.close()
        asyncio.run(store.close())
        [found] = again(path, session.id)
        assert found is not None
        assert outside(found) == outside(session)


def test_a_log_that_breaks_off_anywhere_leaves_whole_turns(
    new_player: MakePlayer, path: Path, store: JournalStore, tmp_path: Path
) -> None:
    """What a crash leaves of the write-ahead log: some first part of it, whose turns are all there and complete."""
    player = new_player(store=store)
    states = [outside(player.session)]
    for number in range(4):
        player.ask([user("a")], [40 + i % 400 for i in range(200)], text=str(number))  # each supersedes the last
        states.append(outside(player.session))
    log = Path(f"{path}-wal").read_bytes()
    seen = set()
    for place, length in enumerate(np.linspace(0, len(log), 24).astype(int).tolist()):
        copy = tmp_path / f"copy{place}"
        copy.write_bytes(path.read_bytes())
        Path(f"{copy}-wal").write_bytes(log[:length])
        [found] = again(copy, player.session.id)
        if found is not None:
            assert outside(found) in states
            seen.add(len(found.turns))
    assert seen == {0, 1, 2, 3, 4}


def test_choices_are_kept_together_or_not_at_all(new_player: MakePlayer, path: Path, store: JournalStore) -> None:
    player = new_player(store=store)
    player.ask([user("a")], [40], request={"n": 3})
    assert len(player.session.newest()) == 3
    turn, session = player.turn, player.session
    broken = dataclasses.replace(turn.answer, choice=1, note={1, 2})  # type: ignore[arg-type]  # no JSON
    with pytest.raises(StoreError, match="the turn cannot be kept"):
        asyncio.run(store.commit(session, session.begin(turn.prompt), turn.answer, broken, id="x"))
    assert len(session.turns) == 3
    asyncio.run(store.close())
    [found] = again(path, session.id)
    assert found is not None
    assert outside(found) == outside(session)
    assert [turn.number for turn in found.completion(turn.id)] == [0, 1, 2]
    assert [turn.number for turn in found.newest()] == [0, 1, 2]


def test_keys_of_another_match_are_restored(new_player: MakePlayer, path: Path, store: JournalStore) -> None:
    player = new_player(store=store, match="role-content")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = player.ask([user("a")], [40], message={"content": "x", "tool_calls": [call]})
    player.close()
    asyncio.run(store.close())
    after = JournalStore(Journal(path))
    session = after.find(player.session.id)
    assert session is not None
    messages = Match.load("role-content").keyed(parse_messages([user("a"), {**answer, "tool_calls": []}]))
    assert session.find(messages, reasoning=False) is session.turns[0]
    asyncio.run(after.close())


def test_a_restored_session_goes_on(new_player: MakePlayer, path: Path, store: JournalStore) -> None:
    player = new_player(store=store)
    reply = player.ask([user("a")], [40], stop="user", message={"content": "x", "reasoning_content": "r"})
    player.ask([user("a")], [42])  # supersedes the first
    session = player.session
    asyncio.run(store.close())
    later = JournalStore(Journal(path))
    other = new_player(store=later)
    found = later.find(session.id)
    assert found is not None
    assert [found.superseded(turn) for turn in found.turns] == [True, False]
    other.session = found
    other.ask([user("a"), reply, user("b")], [43])
    assert [turn.parent and turn.parent.number for turn in found.turns] == [None, None, 0]
    assert [found.superseded(turn) for turn in found.turns] == [False, False, False]
    assert found.turns[2].answer.rows is not None
    asyncio.run(later.close())
    [last] = again(path, session.id)
    assert last is not None
    assert outside(last) == outside(found)


def test_what_has_ended_stays_gone_and_takes_its_turns_along(
    new_player: MakePlayer, path: Path, store: JournalStore
) -> None:
    player = new_player(store=store)
    player.ask([user("a")])
    kept = store.open("by a chat")
    asyncio.run(store.delete(player.session.id))
    asyncio.run(store.delete("never was"))
    asyncio.run(store.close())
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM turn").fetchone() == (0,)
    later = JournalStore(Journal(path))
    for id in (player.session.id, "never was"):
        with pytest.raises(SessionGone):
            later.find(id)
    assert later.find(kept.id) is None  # it never had a turn
    asyncio.run(later.create())
    expired = asyncio.run(later.expire(0.0, []))
    asyncio.run(later.close())
    last = JournalStore(Journal(path), remembered=2)
    with pytest.raises(SessionExpired):
        last.find(expired[0])
    asyncio.run(last.close())
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM session").fetchone() == (2,)  # the oldest is forgotten for good


def grow(journal: Journal, pages: int | None) -> None:
    """Let the file grow by so many pages, or as it likes: SQLite's own limit, and its own error beyond it."""

    def limit(db: sqlite3.Connection) -> None:
        [[size]] = db.execute("PRAGMA page_count")
        db.execute(f"PRAGMA max_page_count = {4294967294 if pages is None else size + pages}")

    journal._now(limit)


def test_a_full_disk_changes_nothing(new_player: MakePlayer, path: Path) -> None:
    journal = Journal(path)
    store = JournalStore(journal)
    player = new_player(store=store)
    reply = player.ask([user("a")], [40])
    before = outside(player.session)
    grow(journal, 0)
    with pytest.raises(StoreFull, match="the journal's disk is full; nothing has changed") as caught:
        player.ask([user("a"), reply, user("b")], [40 + i % 400 for i in range(4000)])
    assert (caught.value.status, caught.value.body()["error"]["code"]) == (507, "store_full")
    with pytest.raises(StoreFull):
        player.ask([user("a")], [40 + i % 400 for i in range(4000)])  # would have superseded the first
    assert outside(player.session) == before
    grow(journal, None)
    player.ask([user("a"), reply, user("b")], [40 + i % 400 for i in range(4000)])
    after = outside(player.session)
    asyncio.run(store.close())
    [found] = again(path, player.session.id)
    assert found is not None
    assert outside(found) == after


def test_one_that_does_not_fit_takes_no_other_along(new_player: MakePlayer, path: Path) -> None:
    """Writes that wait together share a transaction, but not a failure."""
    journal = Journal(path)
    store = JournalStore(journal)
    player = new_player(store=store)
    sessions = [store.open(name) for name in "abcd"]
    player.ask([user("a")], [40])
    small = player.session.turns[0]
    player.ask([user("b")], [40 + i % 400 for i in range(4000)])
    large = player.session.turns[1]
    grow(journal, 4)

    async def run() -> list[Any]:
        works = []
        for session in sessions:
            turn = large if session.id == "b" else small
            pending = Pending(prompt=turn.prompt, rivals=())
            works.append(store.commit(session, pending, turn.answer, id=session.id))
        return await asyncio.gather(*works, return_exceptions=True)

    results = asyncio.run(run())
    assert [isinstance(result, StoreFull) for result in results] == [False, True, False, False]
    asyncio.run(store.close())
    found = again(path, *"abcd")
    assert [session and len(session.turns) for session in found] == [1, None, 1, 1]


def test_a_commit_whose_caller_leaves_is_whole(new_player: MakePlayer, path: Path, store: JournalStore) -> None:
    player = new_player(store=store)
    player.ask([user("a")], [40])
    turn, session = player.session.turns[0], store.open("other")

    async def run() -> None:
        pending = Pending(prompt=turn.prompt, rivals=())
        task = asyncio.create_task(store.commit(session, pending, turn.answer, id="x"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await store.close()

    asyncio.run(run())
    [found] = again(path, "other")
    assert found is not None
    assert [turn.id for turn in found.turns] == [turn.id for turn in session.turns] == ["x"]


def test_a_client_that_leaves_during_its_commit_and_asks_again(
    new_player: MakePlayer, path: Path, store: JournalStore, answer: Callable[..., dict[str, Any]]
) -> None:
    """Its first answer is in the journal when the second is asked for, and superseded once that one is there."""
    player, go = new_player(store=store), threading.Event()
    player._engine.write = lambda body: answer(body, [40, 41])

    async def play() -> None:
        blocked = store._journal._submit(lambda db: go.wait())
        while not blocked.running():
            await asyncio.sleep(0.001)
        first = asyncio.create_task(player._chats.complete(player.session.id, {"messages": [user("a")]}))
        while store._journal._queue.empty():
            await asyncio.sleep(0.001)
        first.cancel()
        second = asyncio.create_task(player._chats.complete(player.session.id, {"messages": [user("a")]}))
        while len(store._begun) < 2:
            await asyncio.sleep(0.001)
        go.set()
        await asyncio.wait([first, second])
        assert first.cancelled()
        assert second.result().body()["choices"][0]["token_ids"] == [40, 41]
        blocked.result()

    try:
        player._runner.run(play())
    finally:
        go.set()
    assert [record["status"] for record in player.session.records()] == ["superseded", "completed"]
    asyncio.run(store.close())
    [found] = again(path, player.session.id)
    assert found is not None
    assert found.records() == player.session.records()


def test_commits_and_a_deletion_at_once(new_player: MakePlayer, path: Path, store: JournalStore) -> None:
    player = new_player(store=store)
    player.ask([user("a")], [40])
    turn, session = player.session.turns[0], store.open("other")

    async def run() -> list[Any]:
        pending = Pending(prompt=turn.prompt, rivals=())
        works: list[Any] = [store.commit(session, pending, turn.answer, id=str(n)) for n in range(4)]
        tasks = [asyncio.ensure_future(work) for work in works]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await store.delete("other")
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(run())
    assert {type(result) for result in results} <= {tuple, SessionGone}
    asyncio.run(store.close())
    with pytest.raises(SessionGone):
        again(path, "other")
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM turn WHERE session = 'other'").fetchone() == (0,)


def test_a_deletion_that_cannot_be_kept_is_none(new_player: MakePlayer, path: Path, store: JournalStore) -> None:
    player = new_player(store=store)
    player.ask([user("a")])
    before = outside(player.session)

    def broken(db: sqlite3.Connection) -> None:
        db.execute("PRAGMA query_only = ON")

    store._journal._now(broken)
    with pytest.raises(StoreError, match="the journal cannot be written") as caught:
        asyncio.run(store.delete(player.session.id))
    assert caught.value.status == 503
    assert store.find(player.session.id) is player.session
    assert outside(player.session) == before


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"no database at all, but long enough to be a header" * 20, "file is not a database"),
        ("foreign", "something else"),
    ],
)
def test_files_that_are_no_journal(path: Path, content: bytes | str, text: str) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE t(x)")
    before = path.read_bytes()
    with pytest.raises(StartupError, match=text) as caught:
        Journal(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_journals_of_another_server(path: Path, store: JournalStore) -> None:
    with pytest.raises(StartupError, match="is in use by another session server"):
        Journal(path)
    asyncio.run(store.close())
    with pytest.raises(StartupError, match="another tokenizer, routing or --match: expected , got other"):
        Journal(path, subject="other")
    with pytest.raises(StartupError, match="belongs to process 0 of 1, not 0 of 2: keep --workers"):
        Journal(path, share=Share(index=0, count=2))
    with pytest.raises(StartupError, match="No such file or directory"):
        open_store(f"sqlite:{path.parent}/no/folder")
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(StartupError, match="journal of format 7, and this version reads format 1"):
        Journal(path)


def test_a_turn_that_cannot_be_read_is_named(new_player: MakePlayer, path: Path, store: JournalStore) -> None:
    player = new_player(store=store)
    player.ask([user("a")])
    asyncio.run(store.close())
    with sqlite3.connect(path) as db:
        db.execute("UPDATE turn SET arrays = x'00'")
    for _ in range(2):  # and the file is not held afterwards
        with pytest.raises(StartupError, match=f"turn 0 of session {player.session.id} cannot be read"):
            open_store(f"sqlite:{path}")


def test_older_heads_have_defaults_and_every_field_is_kept(new_player: MakePlayer) -> None:
    """A class that gains a field has it in the journal, or this fails."""
    player = new_player()
    player.ask([user("a")], [40])
    turn = player.session.turns[0]
    note = "why"
    pending = Pending(prompt=dataclasses.replace(turn.prompt, note=note), rivals=(turn,))
    head, arrays = pack_turn(pending, turn.answer, id="x", created=1.5)
    made, answer, id, created = unpack_turn(head, arrays, [turn])
    assert (id, created, made.rivals, made.prompt.note) == ("x", 1.5, (turn,), note)
    derived = {"raw", "plain", "role", "reasoning", "key"}  # a message is its raw and its key; the rest follows
    for kind, before, after in (
        (Prompt, pending.prompt, made.prompt),
        (Render, turn.prompt.render, made.prompt.render),
        (Answer, turn.answer, answer),
        (Message, turn.answer.message, answer.message),
        (Message, turn.prompt.appended[0], made.prompt.appended[0]),
    ):
        for field in dataclasses.fields(kind):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if isinstance(old, np.ndarray):
                np.testing.assert_array_equal(old, new)
                assert old.dtype == new.dtype
            elif field.name == "rows":
                for name in ("experts", "provenance", "version"):
                    np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
                assert (old.layers, old.num_experts) == (new.layers, new.num_experts)
            elif field.name in ("render", "message", "appended"):
                assert field.name not in derived
            else:
                assert old == new, field.name
    assert '"note":"why",' in head
    older, *_ = unpack_turn(head.replace('"note":"why",', ""), arrays, [turn])
    assert older.prompt.note is None
    assert parse_message(answer.message.raw, "it").key == answer.message.key


def test_a_write_that_nobody_waits_for_any_more_does_not_stop_the_journal(path: Path) -> None:
    journal = Journal(path)

    async def run() -> None:
        works = [asyncio.ensure_future(journal.start(Session(name))) for name in "abcdefgh"]
        await asyncio.sleep(0)
        for work in works[::2]:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        await journal.start(Session("last"))

    asyncio.run(run())
    found = [session.id for session in journal.sessions()]
    assert found[-1] == "last"
    assert {"b", "d", "f", "h"} <= set(found)
    journal.close()
