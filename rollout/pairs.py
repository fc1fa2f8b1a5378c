"""Drives prefill/decode pairs of SGLang and joins what each side knows of the routes; no gateway does.

Both sides get the same body and a room to meet in. The prefill side computes the prompt and knows its routes; the
decode side generates, and has zeros for the prompt's. The answer is the decode side's, with

    rows = prefill_rows ++ decode_rows[len(prefill_rows):]

Protocol: bootstrap_host, bootstrap_port and bootstrap_room of `ChatCompletionRequest` in
srt/entrypoints/openai/protocol.py of SGLang 0.5.23. Legend: P prompt tokens, G generated tokens, H the first row that
was asked for.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import random
import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

from pacenote.rollout.errors import UpstreamError
from pacenote.rollout.sglang import Engine
from pacenote.rollout.worker import worker_url

AUTO = "auto"  # in place of pairs: those of the gateway's listing
RELEARN = 10.0  # seconds after which a gateway is asked anew
SLACK = 8  # requests by which a session's own pair may be busier than the least busy one
ABORT_SECONDS = 5.0
_INT32 = 4
_SHAPE = re.compile(r"(?P<prefill>[^,\s]+),(?P<port>\d{1,5}),(?P<decode>[^,\s]+)")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two engines of one model.

    Attributes:
        prefill: base URL.
        bootstrap_port: of the prefill engine (`--disaggregation-bootstrap-port`).
        decode: base URL.

    Raises:
        ValueError: not URLs, not a port, or one engine twice.
    """

    prefill: str
    bootstrap_port: int
    decode: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefill", worker_url(self.prefill))
        object.__setattr__(self, "decode", worker_url(self.decode))
        if not 0 < self.bootstrap_port < 65536:
            raise ValueError(f"expected a bootstrap port of 1 to 65535, got {self.bootstrap_port}")
        if self.prefill == self.decode:
            raise ValueError(f"expected two engines for a pair, got {self.prefill} twice")

    @classmethod
    def read(cls, text: str) -> Pair:
        """From PREFILL_URL,BOOTSTRAP_PORT,DECODE_URL.

        Raises:
            ValueError: another form.
        """
        found = _SHAPE.fullmatch(text)
        if found is None:
            raise ValueError(f"expected --pair PREFILL_URL,BOOTSTRAP_PORT,DECODE_URL, got {text!r}")
        return cls(prefill=found["prefill"], bootstrap_port=int(found["port"]), decode=found["decode"])

    @property
    def bootstrap_host(self) -> str:
        """Where decode finds prefill's bootstrap port: the host of its URL."""
        return urlsplit(self.prefill).hostname or ""


Learn = Callable[[], Awaitable[Sequence[Pair]]]


async def known(*pairs: Pair) -> Sequence[Pair]:
    """Pairs that do not change."""
    return pairs


def _affinity(session: str, pair: Pair) -> bytes:
    """The pair that has the largest for a session is its own, and stays so when others come or go."""
    return blake2b(f"{session}\0{pair.prefill}\0{pair.decode}".encode(errors="surrogatepass"), digest_size=8).digest()


class Pairs:
    """A `sglang.Engine` whose answers come from pairs: a session's own, which has its prefix, or the least busy one.

    Args:
        learn: gives the pairs; asked again after RELEARN seconds and after a failure.
        timeout: seconds that one answer may take.
    """

    def __init__(self, learn: Learn, *, timeout: float) -> None:
        self._learn, self._timeout = learn, timeout
        self._pairs: Sequence[Pair] = ()
        self._learnt = float("-inf")
        self._engines: dict[str, Engine] = {}
        self._busy: dict[str, int] = {}
        self._aborts = httpx.AsyncClient(timeout=ABORT_SECONDS, trust_env=False)
        self._aborting: set[asyncio.Task[None]] = set()

    async def chat(self, body: bytes, *, session: str = "") -> bytes:
        """As `Engine.chat`. When one side fails, or the caller is cancelled, the other is aborted.

        Raises:
            UpstreamError: no pair, or two answers that do not belong together; else as `Engine.chat`.
        """
        pair = await self._pick(session)
        asked: dict[str, Any] = orjson.loads(body)
        rid = f"pair-{uuid.uuid4().hex}"
        room = {
            "rid": rid,
            "bootstrap_host": pair.bootstrap_host,
            "bootstrap_port": pair.bootstrap_port,
            "bootstrap_room": random.getrandbits(62),
        }
        sent = orjson.dumps(asked | room)
        urls = (pair.prefill, pair.decode)
        for url in urls:
            self._busy[url] = self._busy.get(url, 0) + 1
        sides = [asyncio.create_task(self._engine(url).chat(sent, session=session)) for url in urls]
        try:
            prefill, decode = await asyncio.gather(*sides)
        except BaseException as error:
            self._learnt = float("-inf")
            raise await self._failed(pair, sides, rid, error) from error
        finally:
            for url in urls:
                self._busy[url] -= 1
        return await asyncio.to_thread(join, prefill, decode, start=int(asked.get("routed_experts_start_len") or 0))

    async def close(self) -> None:
        """Close the connections."""
        if self._aborting:
            await asyncio.wait(self._aborting, timeout=ABORT_SECONDS)
        for engine in self._engines.values():
            await engine.close()
        await self._aborts.aclose()

    async def _pick(self, session: str) -> Pair:
        now = asyncio.get_running_loop().time()
        if now - self._learnt > RELEARN:
            self._pairs, self._learnt = await self._learn(), now
        if not self._pairs:
            raise UpstreamError("no prefill/decode pair: expected at least one prefill and one decode worker")
        busy = [self._busy.get(pair.prefill, 0) + self._busy.get(pair.decode, 0) for pair in self._pairs]
        if session:
            own = max(range(len(busy)), key=lambda place: _affinity(session, self._pairs[place]))
            if busy[own] <= min(busy) + SLACK:
                return self._pairs[own]
        return self._pairs[busy.index(min(busy))]

    def _engine(self, url: str) -> Engine:
        if url not in self._engines:
            self._engines[url] = Engine(url, timeout=self._timeout)
        return self._engines[url]

    async def _failed(
        self, pair: Pair, sides: Sequence[asyncio.Task[bytes]], rid: str, error: BaseException
    ) -> BaseException:
        """Abort both sides, also by name: a side that waits for the other may not look at its connection."""
        for task in sides:
            task.cancel()
        for url in (pair.prefill, pair.decode):
            abort = asyncio.create_task(self._abort(url, rid))
            self._aborting.add(abort)
            abort.add_done_callback(self._aborting.discard)
        await asyncio.gather(*sides, return_exceptions=True)
        if isinstance(error, UpstreamError):
            return type(error)(f"pair {pair.prefill} and {pair.decode}: {error}")
        return error

    async def _abort(self, url: str, rid: str) -> None:
        try:
            await self._aborts.post(f"{url}/abort_request", json={"rid": rid})
        except httpx.HTTPError as error:
            log.warning("%s could not be told to abort %s: %s", url, rid, error or type(error).__name__)


def join(prefill: bytes, decode: bytes, *, start: int) -> bytes:
    """The decode side's answer with the prefill side's rows and input logprobs.

    Args:
        prefill, decode: bodies of status 200.
        start: the first row that was asked for, H.

    Raises:
        UpstreamError: the two do not belong together, or the prefill side's rows are not there.
    """
    first, answer = _meta(prefill, "prefill"), orjson.loads(decode)
    meta = _meta(decode, "decode")
    if meta.get("finish_reason", {}).get("type") == "abort":
        return decode
    for name in ("prompt_tokens", "weight_version"):
        if first.get(name) != meta.get(name):
            raise UpstreamError(
                f"expected prefill and decode to agree on {name}, got {first.get(name)!r} and {meta.get(name)!r}"
            )
    tokens = [_first_token(first), _first_token(meta)]
    if tokens[0] != tokens[1]:
        raise UpstreamError(f"expected decode to go on from prefill's first token {tokens[0]}, it has {tokens[1]}")
    choice = answer["choices"][0]
    changed = dict(meta)
    if first.get("input_token_logprobs") is not None:
        changed["input_token_logprobs"] = first["input_token_logprobs"]
    if "cached_tokens" in first:
        changed["cached_tokens"] = first["cached_tokens"]
    theirs = meta.get("routed_experts")
    if theirs is None and meta.get("completion_tokens") == 1:
        theirs = first.get("routed_experts")  # decode computed nothing: all rows are prefill's, and SGLang sends none
    if theirs is not None:
        counts = (
            int(meta["prompt_tokens"]) - start,
            int(meta["prompt_tokens"]) + int(meta["completion_tokens"]) - 1 - start,
        )
        changed["routed_experts"] = join_rows(first.get("routed_experts"), theirs, *counts)
    choice["meta_info"] = changed
    return orjson.dumps(answer)


def join_rows(prefill: object, decode: object, held: int, whole: int) -> str:
    """base64 of the `whole` rows of both: `held` of the prefill side, then the decode side's beyond these.

    Raises:
        UpstreamError: another number of rows, rows of the prompt that are all zeros, or a decode side that has rows of
            the prompt, and other ones.
    """
    mine, theirs = _bytes(prefill, "prefill"), _bytes(decode, "decode")
    if whole <= 0 or len(theirs) % (whole * _INT32) or not theirs:
        raise UpstreamError(f"expected {whole} rows from decode, got {len(theirs)} bytes")
    size = len(theirs) // whole
    if len(mine) != held * size:
        raise UpstreamError(f"expected {held} rows of {size} bytes from prefill, got {len(mine)} bytes")
    if held and not any(mine):
        raise UpstreamError("the prefill side's routes are all zeros: start it with --enable-return-routed-experts")
    known = theirs[: held * size]
    if any(known) and known != mine:
        differing = sum(
            any(known[at : at + size]) and known[at : at + size] != mine[at : at + size]
            for at in range(0, len(known), size)
        )
        log.warning(
            "decode has %d of %d rows of the prompt otherwise than prefill; prefill's are taken", differing, held
        )
    return base64.b64encode(mine + theirs[held * size :]).decode()


def _bytes(payload: object, side: str) -> bytes:
    try:
        if isinstance(payload, str):
            return base64.b64decode(payload, validate=True)
    except binascii.Error:
        pass
    raise UpstreamError(f"expected routed_experts in base64 from {side}, got {str(payload)[:40]!r}")


def _meta(body: bytes, side: str) -> dict[str, Any]:
    try:
        meta: Any = orjson.loads(body)["choices"][0]["meta_info"]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise UpstreamError(f"expected choices[0].meta_info from {side}, got {body[:80]!r}") from error
    if not isinstance(meta, dict):
        raise UpstreamError(f"expected meta_info as an object from {side}, got {meta!r}")
    return meta


def _first_token(meta: dict[str, Any]) -> object:
    try:
        return meta["output_token_logprobs"][0][1]
    except (KeyError, IndexError, TypeError) as error:
        raise UpstreamError(f"expected output_token_logprobs of a first token, got {error!r}") from error


def from_gateway(url: str, *, timeout: float) -> Learn:
    """The pairs that a gateway lists: each healthy prefill worker with each healthy decode worker.

    Protocol: GET /workers of the SGLang gateways.
    """

    async def learn() -> Sequence[Pair]:
        try:
            async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
                body = (await client.get(f"{url}/workers")).raise_for_status().json()
            workers = [entry for entry in body["workers"] if entry.get("is_healthy")]
            prefill = [w for w in workers if w["worker_type"] == "prefill" and w.get("bootstrap_port")]
            decode = [w for w in workers if w["worker_type"] == "decode"]
            return [
                Pair(prefill=p["url"], bootstrap_port=int(p["bootstrap_port"]), decode=d["url"])
                for p in prefill
                for d in decode
            ]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UpstreamError(f"expected a listing of workers from {url}/workers, got {error!r}") from error

    return learn
