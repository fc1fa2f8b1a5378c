"""Chats in flight: who waits for which, and which answers an Idempotency-Key gets again.

A flight is one chat on its way, in a task of its own. Its clients wait for it; when the last of them has gone, or the
session is deleted, it is cancelled, which closes its connections to the engine. With a key, a second request joins the
first one's flight, or gets the answer that it left behind.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from pacenote.rollout.completion import Completion
from pacenote.rollout.errors import ClientGone, KeyReused, SessionGone

REMEMBERED = 64 << 20  # bytes of answers that are kept for repeated keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A request's Idempotency-Key.

    Attributes:
        name: the header.
        digest: of the request's body.
    """

    name: str
    digest: bytes


class _Flight:
    """One chat: its task, its key, and how many clients wait for it."""

    def __init__(self, task: asyncio.Task[Completion], key: Key | None) -> None:
        self.task, self.key, self.clients = task, key, 0


class Flights:
    """The chats in flight of one server; used on its event loop only.

    Args:
        remembered: bytes of finished answers to keep for repeated keys; the oldest go first.
    """

    def __init__(self, *, remembered: int = REMEMBERED) -> None:
        self._flights: dict[str, set[_Flight]] = {}
        self._keyed: dict[tuple[str, str], _Flight] = {}
        self._answers: OrderedDict[tuple[str, str], tuple[bytes, Completion]] = OrderedDict()
        self._remembered, self._bytes = remembered, 0

    def __len__(self) -> int:
        """Chats in flight."""
        return sum(map(len, self._flights.values()))

    def count(self, session_id: str) -> int:
        """Chats of this session that are in flight."""
        return len(self._flights.get(session_id, ()))

    def sessions(self) -> list[str]:
        """Ids of the sessions that have chats in flight."""
        return list(self._flights)

    def forget(self, session_id: str) -> None:
        """The session has ended: cancel its chats, whose clients get SessionGone, and drop the answers that it left."""
        for name in [name for name in self._answers if name[0] == session_id]:
            self._bytes -= len(self._answers.pop(name)[1].data)
        for flight in self._flights.get(session_id, ()):
            flight.task.cancel()

    def abort_all(self) -> None:
        """Cancel every chat."""
        for session_id in self._flights:
            for flight in self._flights[session_id]:
                flight.task.cancel()

    async def answer(
        self,
        session_id: str,
        chat: Callable[[], Coroutine[Any, Any, Completion]],
        *,
        gone: asyncio.Future[None],
        key: Key | None,
    ) -> Completion:
        """The answer to one request.

        Args:
            session_id: which session it is for.
            chat: starts the chat.
            gone: done once the client has closed its connection.
            key: its Idempotency-Key.

        Raises:
            ClientGone: the client went first.
            KeyReused: the key came with another body before.
            SessionGone: the session was deleted meanwhile.
            SessionError: whatever the chat raises.
        """
        flight = None
        if key is not None:
            name = (session_id, key.name)
            if name in self._answers:
                digest, completion = self._answers[name]
                _check_body(key, digest)
                return completion
            flight = self._keyed.get(name)
            if flight is not None and flight.key is not None:
                _check_body(key, flight.key.digest)
        return await self._wait(session_id, flight or self._start(session_id, chat, key), gone)

    async def _wait(self, session_id: str, flight: _Flight, gone: asyncio.Future[None]) -> Completion:
        flight.clients += 1
        try:
            either: list[asyncio.Future[Any]] = [flight.task, gone]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientGone("the client closed its connection before it had the answer")
            if flight.task.cancelled():
                raise SessionGone(f"session {session_id} was deleted while it generated")
            return flight.task.result()
        finally:
            flight.clients -= 1
            if not flight.clients:  # and nobody may join what is being cancelled
                self._close(session_id, flight)
                if not flight.task.cancel() and gone.done() and flight.key is None:
                    _abandon(flight.task)

    def _start(self, session_id: str, chat: Callable[[], Coroutine[Any, Any, Completion]], key: Key | None) -> _Flight:
        flight = _Flight(asyncio.create_task(chat()), key)
        self._flights.setdefault(session_id, set()).add(flight)
        if key is not None:
            self._keyed[session_id, key.name] = flight
        flight.task.add_done_callback(lambda _: self._land(session_id, flight))
        return flight

    def _land(self, session_id: str, flight: _Flight) -> None:
        flights = self._flights[session_id]
        flights.discard(flight)
        if not flights:
            del self._flights[session_id]
        self._close(session_id, flight)
        if not flight.task.cancelled() and flight.task.exception() is None and flight.key is not None:
            self._keep((session_id, flight.key.name), flight.key.digest, flight.task.result())

    def _close(self, session_id: str, flight: _Flight) -> None:
        """Let no further request join."""
        if flight.key is not None and self._keyed.get((session_id, flight.key.name)) is flight:
            del self._keyed[session_id, flight.key.name]

    def _keep(self, name: tuple[str, str], digest: bytes, completion: Completion) -> None:
        if name in self._answers:
            return
        self._answers[name] = (digest, completion)
        self._bytes += len(completion.data)
        while self._bytes > self._remembered:
            _, (_, oldest) = self._answers.popitem(last=False)
            self._bytes -= len(oldest.data)


def _abandon(task: asyncio.Task[Completion]) -> None:
    """Its clients went when it had just been done, and have no key to ask for it again."""
    if not task.cancelled() and task.exception() is None:
        task.result().abandon()


def _check_body(key: Key, digest: bytes) -> None:
    if key.digest != digest:
        raise KeyReused(
            f"Idempotency-Key {key.name!r} came with another body before: send the same bytes again, or another key",
            param="Idempotency-Key",
        )
