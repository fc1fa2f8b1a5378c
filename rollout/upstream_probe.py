"""Does what a session needs survive the way to the engine and back? Asked once, over the real chain, before anybody is
answered: published gateways drop fields and still answer 200.

Legend: P prompt tokens, G generated tokens, L layers (all), K experts a token.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from pacenote.replay.spec import RoutingGeometry
from pacenote.rollout.errors import BadRequest, UpstreamError, UpstreamUnproven

GENERATED = 4
AGAIN, PATIENCE = 5.0, 20.0  # seconds between two attempts; seconds that a chat waits for the first verdict
_GATEWAY = (
    "a gateway on the way drops it: sglang-router up to 0.3.2 does; put smg 1.13 or newer there, or point --upstream "
    "at the engine itself"
)
_PAIR = (
    "that is what a decode engine answers behind a gateway, which joins no pair's routes: use --pair "
    "PREFILL_URL,BOOTSTRAP_PORT,DECODE_URL, or --pair auto to learn the pairs from the gateway's listing"
)
_UNRECORDED = "start SGLang with --enable-return-routed-experts, or keep no routes (--no-routing-replay)"
log = logging.getLogger(__name__)


class Chatting(Protocol):
    """What answers chat bodies: an engine, or pairs."""

    async def chat(self, body: bytes, *, session: str = "") -> bytes:
        """See `sglang.Engine.chat`."""
        ...


async def probe(engine: Chatting, ids: Sequence[int], geometry: RoutingGeometry | None, *, model: str) -> list[str]:
    """What is lost on the way, in words; empty if nothing is.

    Args:
        engine: the chain to try.
        ids: P tokens that no template would make of "hi".
        geometry: of the model; None if no routes are kept.
        model: name of the served model.

    Raises:
        UpstreamError: no answer yet.
    """
    body: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": "hi"}], "input_ids": list(ids), "stream": False,
        "max_tokens": GENERATED, "temperature": 0, "ignore_eos": True, "logprobs": True, "return_meta_info": True,
        "return_prompt_token_ids": True, "no_stop_trim": False, "return_routed_experts": geometry is not None,
    }  # fmt: skip
    try:
        choice = _choice(await engine.chat(orjson.dumps(body)))
    except BadRequest as error:  # it took fields of the probe, but not these
        return [f"the engine refused the probe: {error}"]
    lost = _prompt(choice, ids)
    if lost or geometry is None:
        return lost
    meta = choice["meta_info"]
    count = meta.get("completion_tokens")
    if not isinstance(count, int) or count < 1:
        return [f"completion_tokens: expected a number of 1 or more, got {count!r}"]
    lost = _routes(_rows(meta, geometry), len(ids), count, geometry)
    if lost:
        return lost
    start = len(ids) - 1
    later = _choice(await engine.chat(orjson.dumps(body | {"routed_experts_start_len": start})))
    rows = _rows(later["meta_info"], geometry)
    if len(rows) != len(ids) + count - 1 - start:
        log.warning(
            "the engine sends all rows of a prompt each time (routed_experts_start_len is not heeded): long sessions "
            "will be slow; %s", _GATEWAY,
        )  # fmt: skip
    return []


def _choice(raw: bytes) -> dict[str, Any]:
    try:
        choice: dict[str, Any] = orjson.loads(raw)["choices"][0]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise UpstreamError(f"expected a chat completion from the engine, got {raw[:80]!r}") from error
    return choice


def _prompt(choice: dict[str, Any], ids: Sequence[int]) -> list[str]:
    meta = choice.get("meta_info")
    if not isinstance(meta, dict):
        return [f"return_meta_info: the answer has no meta_info; {_GATEWAY}"]
    if meta.get("prompt_tokens") != len(ids):
        return [f"input_ids: {len(ids)} tokens were sent and {meta.get('prompt_tokens')} were read; {_GATEWAY}"]
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and list(echoed) != list(ids):
        return [f"input_ids: the engine read other tokens than were sent; {_GATEWAY}"]
    if not isinstance(meta.get("output_token_logprobs"), list):
        return ["logprobs: meta_info has no output_token_logprobs"]
    return []


def _rows(meta: dict[str, Any], geometry: RoutingGeometry) -> NDArray[np.int32]:
    """[rows, L, K] of an answer; [0, L, K] if there are none that can be read."""
    payload, shape = meta.get("routed_experts"), (geometry.num_layers, geometry.top_k)
    with contextlib.suppress(binascii.Error, ValueError):
        if isinstance(payload, str):
            return np.frombuffer(base64.b64decode(payload, validate=True), dtype="<i4").reshape(-1, *shape)
    return np.zeros((0, *shape), dtype=np.int32)


def _routes(rows: NDArray[np.int32], prompt: int, generated: int, geometry: RoutingGeometry) -> list[str]:
    """What is lost of rows [P + G - 1, L, K]. Experts of a token are distinct, so no row of K >= 2 is all zeros."""
    if not len(rows):
        return [f"return_routed_experts: the answer has no routed experts of this model; {_UNRECORDED}"]
    if len(rows) != prompt + generated - 1:
        return [f"return_routed_experts: expected {prompt + generated - 1} rows, got {len(rows)}"]
    if geometry.top_k < 2:
        return []
    empty: NDArray[np.bool_] = np.logical_not((rows[:, list(geometry.layers)] != 0).any(axis=2))
    if empty[:prompt].all():
        return [f"routes of the prompt: all {prompt} rows are zeros; {_PAIR}"]
    if empty.any():
        token, layer = (int(x[0]) for x in np.nonzero(empty))
        return [f"routes: layer {geometry.layers[layer]} of token {token} is all zeros"]
    return []


class Proof:
    """The probe's verdict, sought in the background; chats ask for it.

    Args:
        check: one attempt, as `probe`.
    """

    def __init__(self, check: Callable[[], Awaitable[list[str]]]) -> None:
        self._check = check
        self._tried, self._good = asyncio.Event(), False
        self._reason = "the way to the engine has not been tried yet"

    async def seek(self) -> None:
        """Try until nothing is lost."""
        while not self._good:
            try:
                lost = await self._check()
            except UpstreamError as error:
                self._reason = str(error)
            else:
                self._good, self._reason = not lost, "; ".join(lost)
                if lost:
                    log.error("sessions are refused: %s", self._reason)
                self._tried.set()
            if not self._good:
                await asyncio.sleep(AGAIN if self._tried.is_set() else AGAIN / 10)

    async def require(self) -> None:
        """Wait for the first verdict.

        Raises:
            UpstreamUnproven: something is lost, or nobody has answered yet.
        """
        if not self._good:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._tried.wait(), PATIENCE)
        if not self._good:
            raise UpstreamUnproven(f"what a session needs does not come through from the engine: {self._reason}")
