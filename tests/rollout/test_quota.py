"""Quotas: what is new is refused, what has been let in is finished, and deleting makes room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.errors import QuotaExceeded, SessionTooLarge
from pacenote.rollout.journal import Journal
from pacenote.rollout.journal_store import JournalStore
from pacenote.rollout.memory_store import MemoryStore
from pacenote.rollout.quota import Quota
from pacenote.rollout.serve_cli import serve_command
from pacenote.rollout.share import Share

if TYPE_CHECKING:
    from tests.rollout.conftest import Player, ScriptedEngine, Served

MakePlayer = Callable[..., "Player"]
USER = {"role": "user", "content": "a"}


def test_each_turn_counts_and_deleting_takes_it_back(new_player: MakePlayer, tmp_path: Path) -> None:
    for store in (MemoryStore(), JournalStore(Journal(tmp_path / "journal"))):
        player = new_player(store=store)
        sizes = [store.held()]
        for _ in range(2):
            player.ask([USER])
            sizes.append(store.held())
            turn = player.turn
            assert turn.answer.rows is not None
            # ids 4, logprobs 4, version 4 a token; experts 2 x 5 layers, provenance 1, version 4 a row
            arrays = 4 * len(turn.prompt.ids) + 12 * len(turn.answer.ids) + 15 * len(turn.answer.rows)
            texts = '[{"role":"user","content":"a"},{"role":"assistant","content":"ok"}]'
            assert sizes[-1] - sizes[-2] == arrays + len(texts)
        asyncio.run(store.delete(player.session.id))
        assert (sizes[0], store.held(), len(store)) == (0, 0, 0)
        asyncio.run(store.close())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["create", "commit", "delete", "expire"]), max_size=12), st.integers(1, 3))
def test_what_is_held_is_the_sum_whatever_happens(new_player: MakePlayer, steps: list[str], most: int) -> None:
    store = MemoryStore(quota=Quota(sessions=most + 1))
    player = new_player(store=store)
    player.ask([USER])
    turn, created = player.turn, [player.session]

    async def play() -> None:
        for number, step in enumerate(steps):
            if step == "create" and len(store) <= most:
                created.append(await store.create())
            elif step == "create":
                with pytest.raises(QuotaExceeded):
                    await store.create()
            elif step == "commit" and created:
                pending = created[-1].begin(turn.prompt)
                await store.commit(created[-1], pending, turn.answer, id=str(number))
            elif step == "delete":
                await store.delete(created.pop(0).id if created else "never")
            elif step == "expire":
                assert sorted(await store.expire(0.0, [])) == sorted(session.id for session in created)
                created.clear()
            assert store.held() == sum(session.bytes for session in created)
            assert len(store) == len(created) <= most + 1

    asyncio.run(play())


def test_a_restart_counts_what_it_finds(new_player: MakePlayer, tmp_path: Path) -> None:
    store = JournalStore(Journal(tmp_path / "journal"))
    player = new_player(store=store)
    player.ask([USER])
    held = store.held()
    asyncio.run(store.close())
    again = JournalStore(Journal(tmp_path / "journal"), quota=Quota(total_bytes=held, sessions=5, session_bytes=1))
    assert again.held() == held
    with pytest.raises(QuotaExceeded, match=f"fewer|less than {held} bytes"):
        again.open("another")
    with pytest.raises(SessionTooLarge, match="below 1 bytes"):
        again.open(player.session.id)
    assert again.find(player.session.id) is not None  # it can still be collected
    asyncio.run(again.close())


def test_each_process_has_its_part() -> None:
    quota = Quota(sessions=10, total_bytes=7, session_bytes=5)
    assert quota.of(Share(index=1, count=4)) == Quota(sessions=3, total_bytes=2, session_bytes=5)


@pytest.mark.parametrize("name", ["sessions", "total_bytes", "session_bytes"])
def test_bounds_that_cannot_be(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = f"--max-{name.replace('_', '-')}"
    assert serve_command(["--model", "m", "--upstream", "http://127.0.0.1:1", flag, "0"]) == 2
    assert f"expected max {name.replace('_', ' ')} of at least 1, got 0" in capsys.readouterr().err


@pytest.fixture
def served(serve: Callable[..., Served]) -> Iterator[Served]:
    """A server with room for two sessions."""
    with serve(quota=Quota(sessions=2)) as server:
        yield server


def test_what_is_in_flight_is_finished(served: Served, engine: ScriptedEngine) -> None:
    """Three chats of sessions that nobody knows are let in while none is held, and all are answered and kept."""

    async def play() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
            engine.hold()
            chats = [
                asyncio.create_task(http.post(f"/sessions/{name}/v1/chat/completions", json={"messages": [USER]}))
                for name in "abc"
            ]
            for _ in chats:
                await asyncio.to_thread(engine.arrived.acquire)
            engine.release()
            assert [(await chat).status_code for chat in chats] == [200, 200, 200]
            for answer in (
                await http.post("/sessions"),
                await http.post("/sessions/d/v1/chat/completions", json={"messages": [USER]}),
            ):
                assert (answer.status_code, answer.json()["error"]["code"]) == (507, "quota_exceeded")
                assert "expected fewer than 2 sessions (--max-sessions), got 3" in answer.json()["error"]["message"]
            known = await http.post("/sessions/a/v1/chat/completions", json={"messages": [USER]})
            assert known.status_code == 200  # what is held goes on
            for name in "ab":
                assert (await http.delete(f"/sessions/{name}")).status_code == 204
            assert (await http.post("/sessions")).status_code == 200
            metrics = (await http.get("/metrics")).text
            assert 'pacenote_errors_total{code="quota_exceeded",status="507"} 2.0' in metrics
            assert "pacenote_sessions 2.0" in metrics

    asyncio.run(play())
