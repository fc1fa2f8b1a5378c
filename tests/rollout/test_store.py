"""Where sessions live."""

from __future__ import annotations

import pytest

from pacenote.rollout.errors import BadRequest, SessionGone
from pacenote.rollout.store import MAX_ID, MemoryStore, SessionStore


def test_a_session_from_start_to_end() -> None:
    store: SessionStore = MemoryStore()
    session = store.create()
    assert store.create().id != session.id
    assert store.find(session.id) is session is store.open(session.id)
    assert not session.recovered
    store.delete(session.id)
    for use in (store.find, store.open):
        with pytest.raises(SessionGone, match=f"session {session.id} was deleted: start another") as caught:
            use(session.id)
        assert caught.value.status == 410
    store.delete(session.id)  # twice is fine


def test_looking_creates_nothing_and_opening_does() -> None:
    store = MemoryStore()
    assert store.find("mine") is None
    assert len(store) == 0
    session = store.open("mine")
    assert session.id == "mine"
    assert session.recovered
    assert store.find("mine") is session
    assert len(store) == 1


def test_an_id_that_never_was_can_be_deleted_and_is_gone_then() -> None:
    store = MemoryStore()
    store.delete("mine")
    with pytest.raises(SessionGone):
        store.open("mine")


def test_ids_have_a_length() -> None:
    store = MemoryStore()
    store.open("x" * MAX_ID)
    with pytest.raises(BadRequest, match="at most 256 characters, got 257"):
        store.open("x" * (MAX_ID + 1))
    store.delete("y" * (MAX_ID + 1))  # remembers no more of it than an id can have
    assert store.find("y" * (MAX_ID + 1)) is None
    assert len(store) == 1


def test_the_memory_of_deleted_ids_is_bounded() -> None:
    store = MemoryStore(remembered=2)
    for name in "abc":
        store.delete(name)
    assert store.find("a") is None
    for name in "bc":
        with pytest.raises(SessionGone):
            store.find(name)
