"""Handlers of Anthropic's Messages and OpenAI's Responses: each stands in front of the chat handler and translates.

A request becomes a chat request of the same session and connection, so that everything the chat handler sees to, a
client that leaves or a deleted session for example, holds here too. JSON is read and written by the standard library:
whole numbers of any size in a tool's arguments come back as they went.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from pacenote.rollout import anthropic, responses
from pacenote.rollout.errors import BadRequest, ClientGone, SessionError
from pacenote.rollout.fields import Object, take
from pacenote.rollout.request_limits import RequestLimits

Handler = Callable[[Request], Awaitable[Response]]
Events = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """A translation.

    Attributes:
        request: its body -> the chat body.
        answer: (the chat handler's answer, its body) -> its answer.
        events: its answer -> names and data of its server-sent events; None if it does not stream.
        error: an error -> its body.
    """

    request: Callable[[Object], dict[str, Any]]
    answer: Callable[[Object, Object], dict[str, Any]]
    events: Callable[[Object], Events] | None
    error: Callable[[SessionError], dict[str, Any]]


class Dialects:
    """The handlers.

    Args:
        chat: the chat handler; its answer to a body without `stream` is one JSON body.
        count: the handler that counts the prompt of a chat body, `{"prompt_tokens"}`.
        decode: token ids -> text, special tokens included.
        limits: of one request.
    """

    def __init__(
        self, chat: Handler, count: Handler, decode: Callable[[Sequence[int]], str], limits: RequestLimits
    ) -> None:
        self._chat, self._count, self._limits = chat, count, limits
        self._messages = Dialect(
            request=anthropic.chat_request,
            answer=lambda completion, body: anthropic.answer(completion, body, decode),
            events=anthropic.events,
            error=anthropic.error_body,
        )
        self._counted = Dialect(
            request=lambda body: anthropic.chat_request(body, counting=True),
            answer=lambda count, _: {"input_tokens": count["prompt_tokens"]},
            events=None,
            error=anthropic.error_body,
        )
        self._responses = Dialect(
            request=responses.chat_request,
            answer=responses.answer,
            events=responses.events,
            error=responses.error_body,
        )

    def routes(self) -> list[Route]:
        """Their paths."""
        base = "/sessions/{session_id}/v1"
        return [
            Route(f"{base}/messages", self.messages, methods=["POST"]),
            Route(f"{base}/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route(f"{base}/responses", self.responses, methods=["POST"]),
        ]

    async def messages(self, request: Request) -> Response:
        """POST /sessions/{id}/v1/messages."""
        return await _translated(self._messages, request, self._chat, self._limits)

    async def count_tokens(self, request: Request) -> Response:
        """POST /sessions/{id}/v1/messages/count_tokens."""
        return await _translated(self._counted, request, self._count, self._limits)

    async def responses(self, request: Request) -> Response:
        """POST /sessions/{id}/v1/responses."""
        return await _translated(self._responses, request, self._chat, self._limits)


async def _translated(dialect: Dialect, request: Request, handler: Handler, limits: RequestLimits) -> Response:
    """The handler's answer to the request as a chat, in the request's own dialect."""
    try:
        try:
            raw = await request.body()
        except ClientDisconnect as error:
            raise ClientGone("the client closed its connection before its request had come") from error
        body, chat = await run_in_threadpool(_asked, dialect, raw, limits)
        answered = await handler(_with_body(request, chat))
    except SessionError as error:
        return Response(json.dumps(dialect.error(error)), error.status, media_type="application/json")
    if dialect.events is None or not body.get("stream"):
        content = await run_in_threadpool(_written, dialect, body, bytes(answered.body))
        return Response(content, media_type="application/json")
    events = await run_in_threadpool(_streamed, dialect, dialect.events, body, bytes(answered.body))
    return StreamingResponse(_each(events), media_type="text/event-stream")


def _asked(dialect: Dialect, raw: bytes, limits: RequestLimits) -> tuple[dict[str, Any], bytes]:
    """(body, chat body as JSON)."""
    limits.check_depth(raw)
    try:
        body = json.loads(raw.decode())  # of bytes it would take UTF-16, which nobody has looked at
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    take(body, "stream", bool)
    try:
        return body, orjson.dumps(dialect.request(body))
    except (orjson.JSONEncodeError, RecursionError) as error:  # numbers, surrogates and depths that cannot be sent on
        raise BadRequest(f"the request cannot be passed on to the engine: {error}") from error


def _written(dialect: Dialect, body: Object, raw: bytes) -> bytes:
    return json.dumps(dialect.answer(json.loads(raw), body)).encode()


def _streamed(dialect: Dialect, events: Callable[[Object], Events], body: Object, raw: bytes) -> list[bytes]:
    answer = dialect.answer(json.loads(raw), body)
    return [f"event: {name}\ndata: {json.dumps(data)}\n\n".encode() for name, data in events(answer)]


def _with_body(request: Request, body: bytes) -> Request:
    """The same request with another body; whether its client leaves is seen as before."""
    unread = [body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await request.receive()

    return Request(request.scope, receive)


async def _each(events: Sequence[bytes]) -> AsyncIterator[bytes]:
    for event in events:
        yield event
