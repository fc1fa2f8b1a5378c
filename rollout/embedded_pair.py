"""The embedded engine as one side of a prefill/decode pair: what a room is, and who hands what over in it. No torch.

Both sides get the same request and meet in its room, on the prefill side's bootstrap port. As in SGLang the prefill
side computes the prompt and samples the first token, the decode side goes on from there, each answers for itself, and
**the decode side knows nothing of the prompt's routes: its rows are zeros there**. Other than in SGLang what travels is
the first token with its logprob, not keys and values: the decode side holds the same weights and computes those again.
The bytes on the port are this module's own: a line with the room, answered by a line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import orjson

from pacenote.rollout.embedded_request import Completion, Request, RequestError, SamplingParams

Mode = Literal["null", "prefill", "decode"]
MODES: tuple[Mode, ...] = ("null", "prefill", "decode")
PATIENCE = 30.0  # seconds that one side waits for the other


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where a request's two sides meet: SGLang's bootstrap_host, bootstrap_port and bootstrap_room."""

    host: str | None = None
    port: int | None = None
    number: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """What the prefill side gives: the first token, its logprob and alternatives (logprob, id), and the version of the
    weights."""

    token: int
    logprob: float
    top: tuple[tuple[float, int], ...]
    version: str


class Rooms:
    """The prefill side's bootstrap port.

    Args:
        patience: seconds that a finished prefill waits to be fetched, and a decode side for its prefill.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._offers: dict[int, asyncio.Future[HandOver]] = {}
        self._taken: dict[int, asyncio.Event] = {}
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            OSError: the port cannot be had.
        """
        self._server = await asyncio.start_server(self._visit, host, port)

    async def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def give(self, number: int, offer: Callable[[], Awaitable[HandOver]]) -> None:
        """Make an offer in a room and wait until it is taken.

        Raises:
            RequestError: nobody came for it, or the room is in use; whatever `offer` raises reaches the other side too.
        """
        if number in self._taken:
            raise RequestError(f"bootstrap_room {number} is in use.")
        future, taken = self._room(number), self._taken.setdefault(number, asyncio.Event())
        try:
            future.set_result(await offer())
            await asyncio.wait_for(taken.wait(), self._patience)
        except TimeoutError:
            raise RequestError(f"nobody came to bootstrap_room {number} within {self._patience:g} s", 500) from None
        except BaseException as error:
            if not future.done():
                future.set_exception(RequestError(f"the prefill side failed: {error or type(error).__name__}", 500))
                future.exception()  # perhaps nobody asks for it
            raise
        finally:
            self._taken.pop(number, None)
            self._offers.pop(number, None)

    def _room(self, number: int) -> asyncio.Future[HandOver]:
        if number not in self._offers:
            self._offers[number] = asyncio.get_running_loop().create_future()
        return self._offers[number]

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            number = int(await reader.readline())
            try:
                offer = await asyncio.wait_for(asyncio.shield(self._room(number)), self._patience)
                answer: dict[str, Any] = asdict(offer)
            except (TimeoutError, RequestError) as error:
                answer = {"error": str(error) or f"no prefill in bootstrap_room {number} within {self._patience:g} s"}
                if number not in self._taken:
                    self._offers.pop(number, None)
            writer.write(orjson.dumps(answer) + b"\n")
            await writer.drain()
            if "error" not in answer and number in self._taken:
                self._taken[number].set()
        writer.close()


class Side:
    """One engine's part in pairs.

    Args:
        mode: "null" (no pair), "prefill" or "decode".
        port: of the prefill side's bootstrap.
        patience: seconds to wait for the other side.
    """

    def __init__(self, mode: Mode = "null", port: int | None = None, *, patience: float = PATIENCE) -> None:
        self.mode, self.port, self._patience = mode, port, patience
        self._rooms = Rooms(patience)

    @contextlib.asynccontextmanager
    async def lifespan(self, host: str) -> Any:
        """The bootstrap port is open inside."""
        if self.mode == "prefill":
            assert self.port is not None, "checked by EngineConfig"
            await self._rooms.open(host, self.port)
        try:
            yield
        finally:
            await self._rooms.close()

    def check(self, room: Room) -> None:
        """Refuse a request that does not say where the sides meet.

        Raises:
            RequestError: it does not.
        """
        if self.mode == "null":
            return
        if room.number is None:
            raise RequestError(
                "Disaggregated request received without bootstrap room id: send bootstrap_host, bootstrap_port and "
                "bootstrap_room, the same to both sides."
            )
        if self.mode == "decode" and (not room.host or room.port is None):
            raise RequestError("bootstrap_host and bootstrap_port are needed to find the prefill side.")

    def params(self, params: SamplingParams) -> SamplingParams:
        """What this side samples: the prefill side one token."""
        if self.mode != "prefill":
            return params
        return replace(params, max_new_tokens=1, min_new_tokens=min(1, params.min_new_tokens))

    async def run(self, request: Request, room: Room, ask: Callable[[], Awaitable[Completion]]) -> Completion:
        """One request on this side.

        Args:
            request: not submitted yet.
            room: where the sides meet.
            ask: submits it, or says at once that it is done, and waits.

        Raises:
            RequestError: the other side did not come.
        """
        if self.mode == "null":
            return await ask()
        assert room.number is not None, "checked"
        if self.mode == "decode":
            request.begin(await self._fetch(room))
            done = await ask()
            return replace(done, rows=_blank(done, len(request.prompt_ids)))
        done_: list[Completion] = []

        async def offer() -> HandOver:
            done_.append(await ask())
            return _hand_over(done_[0])

        await self._rooms.give(room.number, offer)
        return done_[0]

    async def _fetch(self, room: Room) -> HandOver:
        where = f"{room.host}:{room.port}"
        try:
            async with asyncio.timeout(self._patience):
                reader, writer = await asyncio.open_connection(room.host, room.port)
                writer.write(b"%d\n" % (room.number or 0))
                line = await reader.readline()
                writer.close()
            answer = orjson.loads(line)
        except (OSError, TimeoutError, orjson.JSONDecodeError) as error:
            raise RequestError(f"Decode transfer failed: no prefill side at {where}: {error!r}", 500) from error
        if "error" in answer:
            raise RequestError(f"Decode transfer failed: {answer['error']}", 500)
        top = tuple((float(logprob), int(token)) for logprob, token in answer.pop("top"))
        return HandOver(top=top, **answer)


def _hand_over(done: Completion) -> HandOver:
    if not done.output_ids:
        raise RequestError(f"the prefill side did not finish: {done.finish_reason.get('message')}", 500)
    top = done.top_logprobs[0] if done.top_logprobs else ()
    return HandOver(token=done.output_ids[0], logprob=done.logprobs[0], top=top, version=done.weight_versions[0][0])


def _blank(done: Completion, prompt: int) -> Any:
    if done.rows is None or len(done.output_ids) < 2:
        return None
    rows = np.array(done.rows)
    rows[:prompt] = 0
    return rows
