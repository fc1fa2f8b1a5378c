"""Chats in flight: several at once, clients that leave, sessions that are deleted, keys that come again."""

from __future__ import annotations

import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx

from tests.rollout.talk import MORE, USER, WAIT, chat, error, left_open, records, said, samples, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served


def test_two_chats_at_once_are_both_kept(http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor) -> None:
    session = start(http)
    engine.hold()
    both = [pool.submit(chat, http, session, [USER]) for _ in range(2)]
    other = pool.submit(chat, http, session, [MORE])
    for _ in range(3):
        assert engine.arrived.acquire(timeout=WAIT)
    assert http.get(session).json()["metadata"]["in_flight"] == 3  # and nothing waits for them
    assert records(http, session) == []
    engine.release()
    assert [future.result(WAIT).status_code for future in (*both, other)] == [200] * 3
    assert [record["status"] for record in records(http, session)] == ["completed"] * 3
    assert len(samples(http, session)) == 3
    said(http, session, [USER])  # asked again, later: another sample, and the two are not trained any more
    assert [t.status for t in samples(http, session, include_superseded=True)].count("superseded") == 2
    assert len(samples(http, session)) == 2
    assert http.get(session).json()["metadata"]["in_flight"] == 0


def test_delete_does_not_wait_and_aborts(http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor) -> None:
    session = start(http)
    engine.hold()
    waiting = pool.submit(chat, http, session, [USER])
    assert engine.arrived.acquire(timeout=WAIT)
    assert http.delete(session).status_code == 204  # the engine is still held
    assert engine.aborted.acquire(timeout=WAIT)
    assert "was deleted while it generated" in error(waiting.result(WAIT), 410, "session_deleted")
    engine.release()
    error(chat(http, session, [USER]), 410, "session_deleted")
    error(http.get(session), 410, "session_deleted")


def test_a_client_that_leaves_aborts_and_its_retry_is_no_rival(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    engine.hold()
    with left_open(http, session, {"messages": [USER]}):
        assert engine.arrived.acquire(timeout=WAIT)
    assert engine.aborted.acquire(timeout=WAIT)
    engine.release()
    said(http, session, [USER])
    assert [record["status"] for record in records(http, session)] == ["completed"]


def test_everybody_else_is_served_while_one_generates(
    http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    engine.hold()
    held: list[Future[httpx.Response]] = [pool.submit(chat, http, start(http), [USER]) for _ in range(3)]
    for _ in held:
        assert engine.arrived.acquire(timeout=WAIT)
    assert http.get("/health").status_code == 200
    assert http.delete(start(http)).status_code == 204
    engine.release()
    assert {future.result(WAIT).status_code for future in held} == {200}


def test_a_retry_that_comes_before_its_first_client_has_gone(
    http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    """The first is aborted once its client goes, and leaves nothing; the retry is answered."""
    session = start(http)
    engine.hold()
    with left_open(http, session, {"messages": [USER]}):
        assert engine.arrived.acquire(timeout=WAIT)
        retry = pool.submit(chat, http, session, [USER])
        assert engine.arrived.acquire(timeout=WAIT)
    assert engine.aborted.acquire(timeout=WAIT)
    assert not retry.done()
    engine.release()
    assert retry.result(WAIT).status_code == 200
    assert [record["status"] for record in records(http, session)] == ["completed"]
    assert [trajectory.trained for trajectory in samples(http, session)] == [2]


def test_an_answer_that_nobody_read_is_superseded_by_the_retry(http: httpx.Client, engine: ScriptedEngine) -> None:
    """The answer was on its way when its client went: it stays in the records, and in no sample."""
    session = start(http)
    with left_open(http, session, {"messages": [USER]}):
        assert engine.arrived.acquire(timeout=WAIT)
        while not records(http, session):
            pass
    said(http, session, [USER])
    assert [record["status"] for record in records(http, session)] == ["superseded", "completed"]
    assert len(samples(http, session)) == 1


def test_a_request_that_breaks_off_is_nobodys_fault(http: httpx.Client, served: Served, engine: ScriptedEngine) -> None:
    session = start(http)
    head = f"POST {session}/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{{"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as client:
        client.sendall(head.encode())
    said(http, session, [USER])
    assert len(engine.bodies) == 1
    assert 500 not in served.statuses
