"""The session server's handlers: parse, call, answer. Nothing here knows how a chat is answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from pacenote.replay.spec import RoutingGeometry
from pacenote.rollout import tracing
from pacenote.rollout.auth import Keys
from pacenote.rollout.chat import LARGE, Chats
from pacenote.rollout.completion import Completion
from pacenote.rollout.errors import BadRequest, ClientGone, SessionError, UnknownSession
from pacenote.rollout.flights import Flights, Key
from pacenote.rollout.matching import STRICT, Match
from pacenote.rollout.metrics import CONTENT_TYPE, Metrics
from pacenote.rollout.observed import Observed
from pacenote.rollout.pairs import AUTO, Pair, Pairs, from_gateway, known
from pacenote.rollout.request_limits import RequestLimits
from pacenote.rollout.request_log import CODE, answered
from pacenote.rollout.samples import encode_samples
from pacenote.rollout.session import Session
from pacenote.rollout.sglang import Engine
from pacenote.rollout.store import SessionStore
from pacenote.rollout.template import Template
from pacenote.rollout.upstream_probe import Proof, probe

if TYPE_CHECKING:
    from pacenote.rollout.server import SessionConfig

log = logging.getLogger(__name__)
LONGEST_KEY = 255  # characters of an Idempotency-Key


class Front:
    """The handlers, and the chats that are in flight."""

    def __init__(
        self,
        config: SessionConfig,
        template: Template,
        geometry: RoutingGeometry | None,
        store: SessionStore,
        *,
        match: Match = STRICT,
        keys: Keys | None = None,
        instance: str = "",
    ) -> None:
        """Open nothing yet; see `lifespan`."""
        self._config = config
        self.store = store
        self._model = config.served_model or config.model
        self.keys = keys
        self._instance = instance or uuid.uuid4().hex
        self._limits = config.limits
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="sessions")
        self._flights = Flights()
        self.template, self._geometry, self._match = template, geometry, match
        self.metrics = Metrics(
            in_flight=self._flights.__len__, sessions=store.__len__, held=store.held, store_bytes=store.bytes
        )
        self._chats: Chats
        self._proof: Proof | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Open and close the connection pool, on the loop that uses it."""
        engine = self._open_engine()
        self._chats = Chats(
            template=self.template,
            geometry=self._geometry,
            append_roles=self._config.append_roles,
            model=self._model,
            store=self.store,
            engine=engine,
            threads=self._threads,
            policy=self._config.policy,
            match=self._match,
            observe=self._observe,
            limits=self._limits,
        )
        seeking = asyncio.create_task(self._prove(engine)) if self._config.probe else None
        yield
        if seeking is not None:
            seeking.cancel()
        self._flights.abort_all()
        await engine.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open_engine(self) -> Engine | Pairs:
        config, url = self._config, self._config.upstream.rstrip("/")
        if not config.pairs:
            return Engine(url, timeout=config.timeout)
        if config.pairs == (AUTO,):
            return Pairs(from_gateway(url, timeout=min(10.0, config.timeout)), timeout=config.timeout)
        return Pairs(partial(known, *map(Pair.read, config.pairs)), timeout=config.timeout)

    async def _prove(self, engine: Engine | Pairs) -> None:
        """Try the way to the engine until it is good."""
        self._proof = Proof(partial(self.try_upstream, engine))
        await self._proof.seek()

    async def try_upstream(self, engine: Engine | Pairs | None = None) -> list[str]:
        """What is lost on the way to the engine and back: see `upstream_probe.probe`."""
        opened = engine or self._open_engine()
        ids = self.template.encode("pacenote tries the way to the engine")[0]
        try:
            return await probe(opened, ids, self._geometry, model=self._model)
        finally:
            if engine is None:
                await opened.close()

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return _json({"status": "ok", "instance_id": self._instance, "version": own_version()})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus's text."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    def _observe(self, seen: Observed) -> None:
        self.metrics.answered(seen)
        answered(seen, content=self._config.log_content)

    async def create(self, request: Request) -> Response:
        """POST /sessions, and PUT /sessions/{id} for an id of the client's."""
        session = await self.store.create(request.path_params.get("session_id"))
        return _json({"session_id": session.id} | ({"api_key": self.keys.issue(session.id)} if self.keys else {}))

    async def show(self, request: Request) -> Response:
        """GET /sessions/{id}: what was said; empty for an id that is not known, and creates nothing."""
        session_id = request.path_params["session_id"]
        session = self.store.find(session_id)
        answer: Response = await self._off_loop(_shown, session_id, session, self._flights.count(session_id))
        return answer

    async def delete(self, request: Request) -> Response:
        """DELETE /sessions/{id}: at once; what is in flight is aborted."""
        session_id = request.path_params["session_id"]
        await self.store.delete(session_id)
        self.forget(session_id)
        return Response(status_code=204)

    async def samples(self, request: Request) -> Response:
        """POST /sessions/{id}/samples."""
        session_id = request.path_params["session_id"]
        options = await self._read(request, empty=True)
        superseded = options.get("include_superseded", False)
        if not isinstance(superseded, bool):
            raise BadRequest(
                f"include_superseded must be true or false, got {superseded!r}", param="include_superseded"
            )
        session = self.store.find(session_id)
        if session is None:
            raise UnknownSession(f"no session {session_id}: it was never started on this server")
        data = await self._off_loop(_encode, session, superseded)
        return Response(data, media_type="application/octet-stream")

    async def count(self, request: Request) -> Response:
        """The prompt's tokens of a chat body, `{"prompt_tokens"}`; for the dialects that can be asked for it."""
        body = await self._read(request)
        self._limits.check_messages(body)
        return _json({"prompt_tokens": await self._chats.count(request.path_params["session_id"], body)})

    def forget(self, session_id: str) -> None:
        """The session has ended: abort what is in flight, keep no answer of it."""
        self._flights.forget(session_id)

    def busy(self) -> list[str]:
        """Ids of sessions with chats in flight."""
        return self._flights.sessions()

    async def chat(self, request: Request) -> Response:
        """POST /sessions/{id}/v1/chat/completions."""
        session_id = request.path_params["session_id"]
        body = await self._read(request)
        self._limits.check_messages(body)
        body = self._limits.budgeted(body)
        stream, usage = _streaming(body)
        self.store.find(session_id)  # a deleted session has no answers, recorded ones included
        if self._proof is not None:
            await self._proof.require()
        with tracing.span("chat", session_id=session_id):
            completion = await self._complete(request, session_id, body, _key(request, await request.body()))
        if not stream:
            return Response(completion.data, media_type="application/json")
        events = partial(completion.events, usage=usage)
        lines = await self._off_loop(events) if len(completion.data) > LARGE else events()
        return StreamingResponse(_each(lines), media_type="text/event-stream")

    async def _complete(self, request: Request, session_id: str, body: dict[str, Any], key: Key | None) -> Completion:
        """Answer, unless the client leaves or the session is deleted first."""
        gone = asyncio.create_task(_disconnected(request))
        chat = partial(self._chats.complete, session_id, body)
        try:
            return await self._flights.answer(session_id, chat, gone=gone, key=key)
        finally:
            gone.cancel()

    async def _read(self, request: Request, *, empty: bool = False) -> dict[str, Any]:
        """The JSON object of a request's body; `empty` allows none."""
        try:
            raw = await request.body()
        except ClientDisconnect as error:
            raise ClientGone("the client closed its connection before its request had come") from error
        if empty and not raw:
            return {}
        parse = partial(_parsed, raw, self._limits)
        body: dict[str, Any] = await self._off_loop(parse) if len(raw) > LARGE else parse()
        return body

    async def _off_loop(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def _shown(session_id: str, session: Session | None, in_flight: int) -> Response:
    body: dict[str, Any] = {"session_id": session_id, "records": [], "metadata": {"accumulated_token_ids": []}}
    if session is not None:
        body["records"] = session.records()
        body["metadata"] = {
            "accumulated_token_ids": session.accumulated_token_ids(),
            "created": session.created,
            "recovered": session.recovered,
            "recovered_from": session.recovered_from,
            "in_flight": in_flight,
        }
    return _json(body)


def _encode(session: Session, include_superseded: bool) -> bytes:
    return encode_samples([branch.trajectory() for branch in session.branches(include_superseded=include_superseded)])


def _key(request: Request, raw: bytes) -> Key | None:
    """The request's Idempotency-Key."""
    name = request.headers.get("idempotency-key")
    if name is None:
        return None
    if not 1 <= len(name) <= LONGEST_KEY:
        raise BadRequest(
            f"Idempotency-Key must have 1..{LONGEST_KEY} characters, got {len(name)}", param="Idempotency-Key"
        )
    return Key(name=name, digest=blake2b(raw, digest_size=16).digest())


def _streaming(body: dict[str, Any]) -> tuple[bool, bool]:
    """(stream, include usage) of a chat body."""
    stream, options = body.get("stream"), body.get("stream_options")
    if stream not in (None, False, True):
        raise BadRequest(f"stream must be true or false, got {stream!r}", param="stream")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", param="stream_options")
    return bool(stream), bool((options or {}).get("include_usage"))


def _parsed(raw: bytes, limits: RequestLimits) -> dict[str, Any]:
    """The JSON object of a body."""
    limits.check_depth(raw)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    return body


async def _disconnected(request: Request) -> None:
    """Returns once the client has closed the connection (the body has been read before)."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _each(events: Sequence[bytes]) -> AsyncIterator[bytes]:
    for event in events:
        yield event


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def refuse(request: Request, error: SessionError) -> Response:
    """The answer to an error of ours."""
    request.scope[CODE] = error.code
    return _json(error.body(), error.status)


def refuse_path(request: Request, error: HTTPException) -> Response:
    """The answer to a path that is not served, or not by that method."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    request.scope[CODE] = code
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    answer = _json({"error": body}, error.status_code)
    answer.headers.update(error.headers or {})  # such as `allow`
    return answer


def refuse_bug(request: Request, error: Exception) -> Response:
    """The answer to what nobody thought of."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _json(SessionError("internal error of the session server; its log says more").body(), 500)


def own_version() -> str:
    """Of the installed package."""
    try:
        return version("pacenote")
    except PackageNotFoundError:
        return "unknown"
