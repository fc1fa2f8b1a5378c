"""SGLang's chat endpoint, as far as sessions use it: what is asked, and which answers can be trained on.

The only file on the session side that knows SGLang's field names (0.5.23). Legend: P prompt tokens, G generated tokens,
L layers, K experts a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import aiohttp
import numpy as np
import orjson
from numpy.typing import NDArray

from pacenote.replay.errors import ReplayError
from pacenote.replay.spec import RoutingGeometry
from pacenote.rollout import tracing
from pacenote.rollout.errors import (
    TOO_LONG,
    BadRequest,
    ContextOverflow,
    RollbackFailed,
    UpstreamError,
    UpstreamTimeout,
)
from pacenote.rollout.messages import parse_message
from pacenote.rollout.request_log import request_id
from pacenote.rollout.rows import Rows, read_rows
from pacenote.rollout.turn import Answer, Prompt

CLIENT_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "min_tokens", "stop",
    "stop_token_ids", "ignore_eos", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "top_logprobs", "response_format", "tool_choice", "parallel_tool_calls", "reasoning_effort", "chat_template_kwargs",
)  # fmt: skip
"""Fields of a client's request that reach the engine. Everything else is ours, or nobody's."""

STICKY = "x-smg-routing-key"
"""What smg's policies consistent_hashing and manual choose the worker by (smg 1.13)."""

_OVERFLOW = re.compile(
    r"context[ _](length|window)|maximum (context|allowed length|number of tokens)|longer than the model",
    re.IGNORECASE,
)
_ROLLBACK = re.compile(r"rollback[ _-]failed", re.IGNORECASE)
_ROWS = re.compile(rb'"routed_experts"\s*:\s*"')  # in a text its quotes would be escaped
_CUT = "cut"  # stands for the rows' text
_INT32 = 2**31
_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An engine's answer: the part that is recorded, and what else goes to the client.

    Attributes:
        answer: checked.
        finish_reason: OpenAI's: "stop", "length" or "tool_calls".
        logprobs: OpenAI's `choices[0].logprobs`, as sent.
    """

    answer: Answer
    finish_reason: str
    logprobs: Any


def chat_body(
    prompt: Prompt, request: Mapping[str, Any], *, model: str, routing: bool, start: int | None = None
) -> dict[str, Any]:
    """The body of POST /v1/chat/completions.

    Args:
        prompt: what to generate from; its ids are sent, so the engine's own template is not used.
        request: the client's; only CLIENT_FIELDS are taken from it.
        model: name of the served model; gateways route by it.
        routing: ask for routed experts.
        start: the first row to ask for; None is the first that the session does not hold.
    """
    history = [*(prompt.parent.history() if prompt.parent else ()), *prompt.appended]
    body = {name: request[name] for name in CLIENT_FIELDS if request.get(name) is not None}
    if prompt.render.tools:
        body["tools"] = prompt.render.tools
    return body | {
        "model": model,
        "messages": [message.raw for message in history],  # for tool and reasoning parsers, and gateways' policies
        "input_ids": prompt.token_ids(),
        "stream": False,
        "logprobs": True,
        "return_meta_info": True,
        "no_stop_trim": False,
        "return_routed_experts": routing,
        **({"routed_experts_start_len": prompt.rows_held if start is None else start} if routing else {}),
    }


class Engine:
    """Connections to one engine or gateway.

    Args:
        url: base URL.
        timeout: seconds that one answer may take.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._timeout = timeout
        self._open: aiohttp.ClientSession | None = None

    async def chat(self, body: bytes, *, session: str = "") -> bytes:
        """Send a chat body; cancelling this closes the connection, which makes the engine abort.

        Args:
            body: JSON.
            session: the session's id; a gateway that hashes STICKY keeps it on the engine that has its prefix.

        Raises:
            ContextOverflow: prompt or answer do not fit.
            BadRequest: the engine refused the request's own fields.
            RollbackFailed: the engine cannot continue the prefix that it had.
            UpstreamError: no connection, or any other status than 200.
            UpstreamTimeout: no answer in time.
        """
        try:
            async with self._session().post(
                self._url, data=body, headers=_headers(session), allow_redirects=False
            ) as response:
                content: bytes = await response.read()
        except TimeoutError as error:
            raise UpstreamTimeout(f"the engine at {self._url} did not answer within {self._timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"no answer from the engine at {self._url}: {error or type(error).__name__}") from error
        if response.status != 200:
            raise refusal(response.status, content)
        return content

    async def close(self) -> None:
        """Close them."""
        if self._open is not None:
            await self._open.close()

    def _session(self) -> aiohttp.ClientSession:
        """Opened on the loop that uses it."""
        if self._open is None:
            self._open = aiohttp.ClientSession(
                # No idle connections: an engine may have closed one just now.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=min(10.0, self._timeout)),
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=1 << 20,
            )
        return self._open


def _headers(session: str) -> dict[str, str]:
    """Of a request to the engine: log and trace are told from ours, and a gateway knows the session again."""
    headers = {"content-type": "application/json", **tracing.outgoing()}
    if session:
        headers[STICKY] = blake2b(session.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    if name := request_id():
        headers["x-request-id"] = name
    return headers


def refusal(status: int, body: bytes) -> BadRequest | UpstreamError:
    """The error for a status other than 200: a 400 is the request's own fault, the rest is the engine's."""
    message = _reason(body)
    if _ROLLBACK.search(body.decode(errors="replace")):
        return RollbackFailed(f"the engine answered {status}: {message}")
    if status in (400, 413, 422) and _OVERFLOW.search(message):
        return ContextOverflow(f"{message} {TOO_LONG}", param="messages")
    if status in (400, 422):
        return BadRequest(f"the engine refused the request: {message}")
    return UpstreamError(f"the engine answered {status}: {message}")


def read_reply(
    raw: bytes, prompt: Prompt, geometry: RoutingGeometry | None, *, start: int | None = None, note: str | None = None
) -> Reply:
    """Check an engine's answer of status 200.

    Args:
        raw: the body.
        prompt: what was asked.
        geometry: the model's routing; None if no routes were asked for.
        start: the first row that was asked for; None is the first that the session does not hold.
        note: what the record says of how it was asked.

    Raises:
        UpstreamError: not JSON, no choice, aborted, or tokens, logprobs and rows that do not fit each other.
        ContextOverflow, RollbackFailed: aborted for this reason.
    """
    rest, cut = _without_rows(raw)
    choice = _choice(_json(rest))
    if cut is not None and _payload(choice) != _CUT:  # it was something else of this name
        cut, choice = None, _choice(_json(raw))
    meta = choice.get("meta_info")
    if not isinstance(meta, dict):
        raise UpstreamError(
            "expected choices[0].meta_info from the engine, got none: a gateway that drops input_ids and "
            "return_meta_info (sglang-router up to 0.3.2) cannot stand in front of a session server"
        )
    finish = meta.get("finish_reason")
    kind = finish.get("type") if isinstance(finish, dict) else None
    if kind not in ("stop", "length") or not isinstance(finish, dict):
        raise _aborted(kind, finish.get("message") if isinstance(finish, dict) else finish)
    ids, logprobs = _tokens(meta)
    _check_counts(meta, prompt, len(ids))
    versions, name = _versions(meta, len(ids))
    message = choice["message"]
    payload = _payload(choice) if cut is None else cut
    rows = None if geometry is None else _rows(payload, meta, prompt, versions, geometry, start)
    answer = Answer(
        message=parse_message(message, "the engine's message"),
        ids=ids,
        logprobs=logprobs,
        versions=versions,
        version_name=name,
        rows=rows.record if rows else None,
        finish=kind,
        stopped=kind == "stop" and finish.get("matched") == int(ids[-1]),
        note="; ".join(text for text in (note, rows and rows.note) if text) or None,
        rows_compared=rows.compared if rows else 0,
        rows_differing=rows.differing if rows else 0,
    )
    called = "tool_calls" if answer.message.raw.get("tool_calls") and kind == "stop" else kind
    return Reply(answer=answer, finish_reason=called, logprobs=choice.get("logprobs"))


def _without_rows(raw: bytes) -> tuple[bytes, bytes | None]:
    """An answer without the text of its rows, and that text: most of it all, and nothing to parse as JSON."""
    found = _ROWS.search(raw)
    if found is None:
        return raw, None
    end = raw.find(b'"', found.end())
    payload = raw[found.end() : max(end, 0)]
    if end < 0 or b"\\" in payload:
        return raw, None
    return raw[: found.end()] + _CUT.encode() + raw[end:], payload


def _json(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise UpstreamError(f"expected JSON from the engine, got {raw[:80]!r}: {error}") from error


def _payload(choice: Mapping[str, Any]) -> Any:
    """The rows as sent; None: there are none."""
    meta = choice.get("meta_info")
    payload = meta.get("routed_experts") if isinstance(meta, dict) else None
    return choice.get("routed_experts") if payload is None else payload  # where vLLM has them


def _aborted(kind: str | None, why: object) -> ContextOverflow | UpstreamError:
    """The error for an answer of status 200 that did not finish: SGLang aborts this way what its scheduler refuses."""
    message = f"expected an answer that finished by stop or length, got {kind or 'none'}: {why}"
    if kind == "abort" and isinstance(why, str):
        if _ROLLBACK.search(why):
            return RollbackFailed(message)
        if _OVERFLOW.search(why):
            return ContextOverflow(f"{why} {TOO_LONG}", param="messages")
    return UpstreamError(message)


def _choice(body: Any) -> dict[str, Any]:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        got = f"{len(choices)} choices" if isinstance(choices, list) else "no choices"
        raise UpstreamError(f"expected one choice from the engine, got {got}")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise UpstreamError(f"expected choices[0].message from the engine, got {message!r}")
    known = ("content", "reasoning_content", "tool_calls")
    kept = {name: message[name] for name in known if message.get(name) not in (None, [])}
    choice: dict[str, Any] = choices[0] | {"message": {"role": "assistant"} | kept}
    try:
        parse_message(choice["message"], "the engine's message")
    except BadRequest as error:
        raise UpstreamError(f"expected an OpenAI message from the engine: {error}") from error
    return choice


def _tokens(meta: Mapping[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids [G] int32 and logprobs [G] float32 of `output_token_logprobs`."""
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or not entries:
        raise UpstreamError(f"expected output_token_logprobs of at least one token from the engine, got {entries!r}")
    ids, logprobs = [], []
    for place, entry in enumerate(entries):
        logprob, token = entry[:2] if isinstance(entry, list) and len(entry) >= 2 else (None, None)
        sound = (
            isinstance(logprob, int | float) and logprob is not False and _LOWEST <= logprob <= 1e-3
        )  # not so for NaN
        if not sound or type(token) is not int or not 0 <= token < _INT32:
            raise UpstreamError(f"expected [logprob, token id] at output token {place} from the engine, got {entry!r}")
        ids.append(token)
        logprobs.append(logprob)
    return np.array(ids, dtype=np.int32), np.array(logprobs, dtype=np.float32)


def _check_counts(meta: Mapping[str, Any], prompt: Prompt, generated: int) -> None:
    for name, count in (("prompt_tokens", prompt.length), ("completion_tokens", generated)):
        if meta.get(name) != count:
            raise UpstreamError(
                f"expected {name} {count} from the engine, got {meta.get(name)!r}: it did not generate from the "
                "session's tokens"
            )


def _versions(meta: Mapping[str, Any], generated: int) -> tuple[NDArray[np.int32], str]:
    """Weight version [G] int32 of each token (-1 where it is no number), and the name of the last."""
    name = str(meta.get("weight_version", "unknown"))
    versions = np.full(generated, _number(name), dtype=np.int32)
    spans = meta.get("weight_versions")
    for span in spans if isinstance(spans, list) else ():
        try:
            start, end, label = int(span["start"]), int(span["end"]), str(span["version"])
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise UpstreamError(f"expected weight_versions of version, start and end, got {span!r}") from error
        if not 0 <= start <= end:
            raise UpstreamError(f"expected weight_versions with 0 <= start <= end, got {span!r}")
        versions[start:end] = _number(label)
        name = label
    return versions, name


def _recomputed(meta: Mapping[str, Any], prompt: int) -> int:
    """Rows that a retraction had computed anew by other weights than those that sampled their tokens.

    SGLang gives such a request its rows of the second time: those of the last weights, up to the last token that older
    ones sampled. Which of several retractions and updates came first it does not say, so this is the most they can be.
    """
    spans = meta.get("weight_versions")
    if not meta.get("num_retractions") or not isinstance(spans, list) or len(spans) < 2:
        return 0
    return prompt + int(spans[-1]["start"]) - 1


def _number(version: str) -> int:
    return int(version) if re.fullmatch(r"\d{1,9}", version) else -1


def _rows(
    payload: Any,
    meta: Mapping[str, Any],
    prompt: Prompt,
    versions: NDArray[np.int32],
    geometry: RoutingGeometry,
    start: int | None,
) -> Rows:
    """The rows from `prompt.rows_held` to the last but one token: P + G - 1 - held of them."""
    if payload is None:
        raise UpstreamError(
            "expected routed_experts from the engine, got none: start SGLang with --enable-return-routed-experts, or "
            "the session server with --no-routing-replay"
        )
    cached = meta.get("cached_tokens") or 0
    if not isinstance(cached, int):
        raise UpstreamError(f"expected cached_tokens as a number from the engine, got {cached!r}")
    first = prompt.rows_held if start is None else start
    try:
        return read_rows(
            payload,
            prompt,
            geometry,
            versions=versions,
            cached=cached,
            start=first,
            recomputed=_recomputed(meta, prompt.length),
        )
    except ReplayError as error:
        raise UpstreamError(f"routes from the engine: {error}") from error


def _reason(body: bytes) -> str:
    """The message of an error body, in SGLang's, OpenAI's or no shape."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[:500].decode(errors="replace") or "an empty body"
    if isinstance(parsed, dict):
        error = parsed.get("error") or parsed
        found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        if isinstance(found, str):
            return found[:2000]
    return body[:500].decode(errors="replace")
