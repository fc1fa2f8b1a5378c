"""Where sessions live, in memory and with a journal: the same rules."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pacenote.rollout.errors import BadRequest, Misdirected, SessionExpired, SessionGone
from pacenote.rollout.journal import Journal
from pacenote.rollout.journal_store import JournalStore
from pacenote.rollout.memory_store import MAX_ID, MemoryStore
from pacenote.rollout.share import Share
from pacenote.rollout.store import check_store, open_store
from pacenote.rollout.turn import Turn

if TYPE_CHECKING:
    from tests.rollout.conftest import Player


class Clock:
    """Seconds, in the test's hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture(params=["memory", "journal"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[MemoryStore]:
    """Either store; two ids that are gone are remembered."""
    if request.param == "memory":
        yield MemoryStore(remembered=2, clock=clock)
        return
    store = JournalStore(Journal(tmp_path / "journal"), remembered=2, clock=clock)
    yield store
    asyncio.run(store.close())


@pytest.fixture
def turn(player: Player) -> Turn:
    """A turn to commit elsewhere."""
    player.ask([{"role": "user", "content": "a"}], [40])
    return player.turn


def test_a_session_from_start_to_end(store: MemoryStore) -> None:
    async def run() -> None:
        session = await store.create()
        assert (await store.create()).id != session.id
        assert store.find(session.id) is session is store.open(session.id)
        assert not session.recovered
        await store.delete(session.id)
        for use in (store.find, store.open):
            with pytest.raises(SessionGone, match=f"session {session.id} was deleted: start another") as caught:
                use(session.id)
            assert (caught.value.status, caught.value.code) == (410, "session_deleted")
        await store.delete(session.id)  # twice is fine

    asyncio.run(run())


def test_looking_and_opening_create_nothing_and_committing_does(store: MemoryStore, turn: Turn) -> None:
    async def run() -> None:
        one, two = store.open("mine"), store.open("mine")
        assert (one.id, one.recovered, one.turns) == ("mine", True, ())
        assert one is not two
        assert store.find("mine") is None
        assert len(store) == 0
        for place, session in enumerate((one, two)):  # two first requests at once: the first to be answered starts it
            [kept] = await store.commit(session, session.begin(turn.prompt), turn.answer, id=str(place))
            assert store.find("mine") is store.open("mine") is one
            assert one.turns[-1] is kept
        assert len(one.turns) == 2
        assert len(store) == 1

    asyncio.run(run())


def test_a_session_that_ended_before_its_first_commit_stays_away(store: MemoryStore, turn: Turn) -> None:
    async def run() -> None:
        new, known = store.open("mine"), await store.create()
        for session in (new, known):
            await store.delete(session.id)
            with pytest.raises(SessionGone):
                await store.commit(session, session.begin(turn.prompt), turn.answer, id="x")
        for name in "abc":  # until both ids are forgotten
            await store.delete(name)
        assert store.find(known.id) is None
        with pytest.raises(SessionGone):
            await store.commit(known, known.begin(turn.prompt), turn.answer, id="x")
        assert len(store) == 0

    asyncio.run(run())


def test_choices_are_committed_together_and_once(store: MemoryStore, turn: Turn) -> None:
    async def run() -> None:
        session = await store.create()
        answers = [replace(turn.answer, choice=choice) for choice in range(3)]
        for _ in range(2):
            turns = await store.commit(session, session.begin(turn.prompt), *answers, id="x")
            assert session.turns == session.newest() == session.completion("x") == turns
        assert [turn.answer.choice for turn in turns] == [0, 1, 2]
        assert not any(session.superseded(turn) for turn in turns)

    asyncio.run(run())


def test_an_answer_that_nobody_got_gives_way_to_one_that_was_asked_for_meanwhile(
    store: MemoryStore, turn: Turn
) -> None:
    async def play() -> None:
        session = await store.create()
        one, two = session.begin(turn.prompt), session.begin(turn.prompt)
        [lost] = await store.commit(session, one, turn.answer, id="a")
        store.abandon(session, "a")
        [kept] = await store.commit(session, two, turn.answer, id="b")
        assert [session.superseded(t) for t in session.turns] == [True, False] == [t is lost for t in (lost, kept)]
        late = session.begin(turn.prompt)
        store.abandon(session, "c")
        assert await store.commit(session, late, turn.answer, id="c") == ()
        assert session.turns == (lost, kept)

    asyncio.run(play())


def test_an_id_that_never_was_can_be_deleted_and_is_gone_then(store: MemoryStore) -> None:
    asyncio.run(store.delete("mine"))
    with pytest.raises(SessionGone):
        store.open("mine")


def test_a_session_under_an_id_of_ones_own_is_made_once(store: MemoryStore, turn: Turn) -> None:
    async def play() -> None:
        one, two = await asyncio.gather(store.create("mine"), store.create("mine"))
        assert one is two is store.find("mine")
        assert not one.recovered
        [kept] = await store.commit(one, one.begin(turn.prompt), turn.answer, id="c")
        assert (await store.create("mine")).turns == (kept,)
        assert len(store) == 1
        await store.delete("mine")
        with pytest.raises(SessionGone):
            await store.create("mine")
        with pytest.raises(BadRequest):
            await store.create("x" * (MAX_ID + 1))

    asyncio.run(play())


def test_a_chat_that_comes_while_its_session_is_made_is_not_lost(store: MemoryStore, turn: Turn) -> None:
    async def play() -> None:
        new = store.open("mine")
        await asyncio.gather(
            store.create("mine"), store.commit(new, new.begin(turn.prompt), turn.answer, id="c"), store.create("mine")
        )
        held = store.find("mine")
        assert held is not None
        assert [kept.id for kept in held.turns] == ["c"]

    asyncio.run(play())


def test_ids_have_a_length(store: MemoryStore) -> None:
    assert len(store.open("x" * MAX_ID).id) == MAX_ID
    with pytest.raises(BadRequest, match="at most 256 characters, got 257"):
        store.open("x" * (MAX_ID + 1))
    asyncio.run(store.delete("y" * (MAX_ID + 1)))  # nobody has it, and it is no other's
    assert store.find("y" * (MAX_ID + 1)) is None
    assert store.find("y" * MAX_ID) is None


def test_the_memory_of_deleted_ids_is_bounded(store: MemoryStore) -> None:
    async def run() -> None:
        for name in "abc":
            await store.delete(name)

    asyncio.run(run())
    assert store.find("a") is None
    for name in "bc":
        with pytest.raises(SessionGone):
            store.find(name)


def test_sessions_that_nobody_uses_expire(store: MemoryStore, clock: Clock, turn: Turn) -> None:
    async def run() -> None:
        for name in ("idle", "seen", "busy"):
            session = store.open(name)
            await store.commit(session, session.begin(turn.prompt), turn.answer, id="x")
        clock.now = 6.0
        store.find("seen")
        assert await store.expire(10.0, ["busy", "unknown"]) == []
        clock.now = 10.0
        assert await store.expire(10.0, ["busy"]) == ["idle"]
        with pytest.raises(SessionExpired, match="session idle expired, unused too long: start another") as caught:
            store.open("idle")
        assert (caught.value.status, caught.value.code) == (410, "session_expired")
        await store.delete("idle")  # says the same as before
        with pytest.raises(SessionExpired):
            store.find("idle")
        clock.now = 16.0
        assert await store.expire(10.0, []) == ["seen"]  # what was busy was used a moment ago
        clock.now = 20.0
        assert await store.expire(10.0, []) == ["busy"]
        assert len(store) == 0

    asyncio.run(run())


def test_each_process_draws_ids_of_its_own(tmp_path: Path) -> None:
    async def run() -> None:
        shares = [Share(index=index, count=3) for index in range(3)]
        for share in shares:
            store = MemoryStore(share=share)
            ids = [(await store.create()).id for _ in range(20)]
            assert [other for other in shares for id in ids if other.holds(id)] == [share] * 20
            foreign = (await MemoryStore(share=shares[share.index - 1]).create()).id
            for use in (store.find, store.open):
                with pytest.raises(Misdirected):
                    use(foreign)

    asyncio.run(run())
    with pytest.raises(ValueError, match="process 3 of 3"):
        Share(index=3, count=3)


def test_values_of_the_flag(tmp_path: Path) -> None:
    assert check_store("memory") is None
    assert check_store("sqlite:a/b") == Path("a/b")
    assert isinstance(open_store("memory"), MemoryStore)
    for wrong in ("", "sqlite:", "sqlite::memory:", "redis://x", "a/b"):
        with pytest.raises(ValueError, match="expected a store of memory or sqlite:PATH"):
            check_store(wrong)
    for index in range(2):
        share = Share(index=index, count=2)
        asyncio.run(open_store(f"sqlite:{tmp_path}/j", share=share).close())
    assert {path.name for path in tmp_path.iterdir()} == {"j", "j.lock", "j.1", "j.1.lock"}
