"""The session server: OpenAI chat in, exact tokens, logprobs and routes kept. See docs/protocol.md.

    python -m pacenote.rollout.server --model DIR --upstream http://127.0.0.1:30000

This file is HTTP only: parse, call, answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from pacenote.replay.errors import ReplayError
from pacenote.replay.spec import RoutingGeometry, geometry_from_config
from pacenote.rollout.chat import Chats
from pacenote.rollout.completion import Completion
from pacenote.rollout.errors import BadRequest, ClientGone, SessionError, SessionGone, StartupError, UnknownSession
from pacenote.rollout.launch import exit_with_parent
from pacenote.rollout.messages import ROLES
from pacenote.rollout.samples import encode_samples
from pacenote.rollout.session import Branch
from pacenote.rollout.sglang import Engine
from pacenote.rollout.store import MemoryStore, SessionStore
from pacenote.rollout.template import FAMILIES, Template
from pacenote.rollout.tito import FLAG

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """Options of the session server.

    Attributes:
        model: directory with tokenizer and config.json, or a model's name in the local hub cache.
        upstream: base URL of an SGLang-compatible engine or gateway.
        family: chat template family; "auto" goes by the tokenizer's special tokens.
        served_model: the model's name upstream; None takes `model`.
        append_roles: roles that agents may append after a generated answer.
        routing_replay: ask for routed experts and keep them.
        host, port: address to listen on.
        timeout: seconds that one answer of the engine may take.

    Raises:
        ValueError: a value that cannot be.
    """

    model: str
    upstream: str
    family: str = "auto"
    served_model: str | None = None
    append_roles: frozenset[str] = frozenset({"tool"})
    routing_replay: bool = True
    host: str = "127.0.0.1"
    port: int = 8100
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.upstream.startswith(("http://", "https://")):
            raise ValueError(f"expected upstream as an http:// or https:// URL, got {self.upstream!r}")
        wrong = sorted(set(self.append_roles) - set(ROLES))
        if wrong:
            raise ValueError(f"expected append roles of {', '.join(ROLES)}, got {', '.join(wrong)}")
        if not self.timeout > 0:
            raise ValueError(f"expected a timeout above 0 seconds, got {self.timeout}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"expected a port in 0..65535, got {self.port}")


def create_app(config: SessionConfig, *, store: SessionStore | None = None) -> Starlette:
    """The ASGI application. Loads the tokenizer and the model's config now.

    Args:
        config: options; host and port are the caller's business.
        store: where sessions live; memory if left out.

    Raises:
        StartupError: the model has no usable tokenizer, template or routing.
    """
    template = Template.load(config.model, family=config.family, append_roles=config.append_roles)
    geometry = load_geometry(config.model) if config.routing_replay else None
    front = _Front(config, template, geometry, store if store is not None else MemoryStore())
    routes = [
        Route("/health", front.health, methods=["GET"]),
        Route("/sessions", front.create, methods=["POST"]),
        Route("/sessions/{session_id}", front.show, methods=["GET"]),
        Route("/sessions/{session_id}", front.delete, methods=["DELETE"]),
        Route("/sessions/{session_id}/samples", front.samples, methods=["POST"]),
        Route("/sessions/{session_id}/v1/models", front.models, methods=["GET"]),
        Route("/sessions/{session_id}/v1/chat/completions", front.chat, methods=["POST"]),
    ]
    handlers: Any = {SessionError: _refuse, HTTPException: _refuse_path, Exception: _refuse_bug}
    return Starlette(routes=routes, lifespan=front.lifespan, exception_handlers=handlers)


def load_geometry(model: str) -> RoutingGeometry:
    """Where a model routes, from its config.json.

    Args:
        model: directory, or a model's name in the local hub cache.

    Raises:
        StartupError: no config.json, or one of a model whose routing is not known.
    """
    path = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except Exception as error:  # hub, cache and network errors of many kinds
            raise StartupError(f"expected a model with config.json, got {model}: {error}") from error
    try:
        config = orjson.loads(path.read_bytes())
        return geometry_from_config(config)
    except (OSError, orjson.JSONDecodeError) as error:
        raise StartupError(f"expected {path} as JSON: {error}; use --no-routing-replay to keep no routes") from error
    except ReplayError as error:
        raise StartupError(f"{path}: {error}; use --no-routing-replay to keep no routes") from error


class _Front:
    """The handlers, and the chats that are in flight."""

    def __init__(
        self, config: SessionConfig, template: Template, geometry: RoutingGeometry | None, store: SessionStore
    ) -> None:
        self._config = config
        self._store = store
        self._model = config.served_model or config.model
        self._instance = uuid.uuid4().hex
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="sessions")
        self._flights: defaultdict[str, set[asyncio.Task[Completion]]] = defaultdict(set)
        self._template, self._geometry = template, geometry
        self._chats: Chats

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Open and close the connection pool, on the loop that uses it."""
        engine = Engine(self._config.upstream.rstrip("/"), timeout=self._config.timeout)
        self._chats = Chats(
            template=self._template,
            geometry=self._geometry,
            append_roles=self._config.append_roles,
            model=self._model,
            store=self._store,
            engine=engine,
            threads=self._threads,
        )
        yield
        for task in [task for tasks in self._flights.values() for task in tasks]:
            task.cancel()
        await engine.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return _json({"status": "ok", "instance_id": self._instance, "version": _version()})

    async def create(self, request: Request) -> Response:
        """POST /sessions."""
        return _json({"session_id": self._store.create().id})

    async def show(self, request: Request) -> Response:
        """GET /sessions/{id}: what was said; empty for an id that is not known, and creates nothing."""
        session_id = request.path_params["session_id"]
        session = self._store.find(session_id)
        body: dict[str, Any] = {"session_id": session_id, "records": [], "metadata": {"accumulated_token_ids": []}}
        if session is not None:
            body["records"] = session.records()
            body["metadata"] = {
                "accumulated_token_ids": session.accumulated_token_ids(),
                "created": session.created,
                "recovered": session.recovered,
                "in_flight": len(self._flights.get(session_id, ())),
            }
        return await self._off_loop(_json, body)

    async def delete(self, request: Request) -> Response:
        """DELETE /sessions/{id}: at once; what is in flight is aborted."""
        session_id = request.path_params["session_id"]
        self._store.delete(session_id)
        for task in self._flights.get(session_id, ()):
            task.cancel()
        return Response(status_code=204)

    async def samples(self, request: Request) -> Response:
        """POST /sessions/{id}/samples."""
        session_id = request.path_params["session_id"]
        options = await _read(request) if await request.body() else {}
        superseded = options.get("include_superseded", False)
        if not isinstance(superseded, bool):
            raise BadRequest(
                f"include_superseded must be true or false, got {superseded!r}", param="include_superseded"
            )
        session = self._store.find(session_id)
        if session is None:
            raise UnknownSession(f"no session {session_id}: it was never started on this server")
        data = await self._off_loop(_encode, session.branches(include_superseded=superseded))
        return Response(data, media_type="application/octet-stream")

    async def models(self, request: Request) -> Response:
        """GET /sessions/{id}/v1/models."""
        card = {"id": self._model, "object": "model", "created": 0, "owned_by": "pacenote"}
        return _json({"object": "list", "data": [card]})

    async def chat(self, request: Request) -> Response:
        """POST /sessions/{id}/v1/chat/completions."""
        body = await _read(request)
        stream, usage = _streaming(body)
        completion = await self._complete(request, request.path_params["session_id"], body)
        if stream:
            events = list(completion.events(usage=usage))
            return StreamingResponse(_each(events), media_type="text/event-stream")
        return _json(completion.body())

    async def _complete(self, request: Request, session_id: str, body: dict[str, Any]) -> Completion:
        """Answer, unless the client leaves or the session is deleted first."""
        task = asyncio.create_task(self._chats.complete(session_id, body))
        gone = asyncio.create_task(_disconnected(request))
        self._flights[session_id].add(task)
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone("the client closed its connection before the answer was ready")
            if task.cancelled():
                raise SessionGone(f"session {session_id} was deleted while it generated")
            return task.result()
        finally:
            gone.cancel()
            task.cancel()
            self._flights[session_id].discard(task)
            if not self._flights[session_id]:
                del self._flights[session_id]

    async def _off_loop(self, function: Any, argument: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, argument)


def _encode(branches: Sequence[Branch]) -> bytes:
    return encode_samples([branch.trajectory() for branch in branches])


def _streaming(body: dict[str, Any]) -> tuple[bool, bool]:
    """(stream, include usage) of a chat body."""
    stream, options = body.get("stream"), body.get("stream_options")
    if stream not in (None, False, True):
        raise BadRequest(f"stream must be true or false, got {stream!r}", param="stream")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", param="stream_options")
    return bool(stream), bool((options or {}).get("include_usage"))


async def _read(request: Request) -> dict[str, Any]:
    """The JSON object of a request's body."""
    raw = await request.body()
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


def _refuse(request: Request, error: SessionError) -> Response:
    return _json(error.body(), error.status)


def _refuse_path(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": "not_found"}
    return _json({"error": body}, error.status_code)


def _refuse_bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _json(SessionError("internal error of the session server; its log says more").body(), 500)


def _version() -> str:
    try:
        return version("pacenote")
    except PackageNotFoundError:
        return "unknown"


class _Server(uvicorn.Server):
    """uvicorn that ends quietly on SIGTERM and SIGINT."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        yield

    def _end(self) -> None:
        self.should_exit = True


def serve(config: SessionConfig) -> None:
    """Answer until SIGTERM or SIGINT.

    Raises:
        OSError: the address cannot be had (found out before anything is loaded).
        StartupError: see `create_app`.
    """
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        app = create_app(config)
        options = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, backlog=2048)
        print(f"sessions on http://{config.host}:{listener.getsockname()[1]}, engine {config.upstream}", flush=True)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Server(options).serve(sockets=[listener]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pacenote serve",
        description="The session server: OpenAI chat in; exact tokens, logprobs and routed experts kept for training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="directory with tokenizer and config.json")
    add("--upstream", required=True, help="base URL of an SGLang-compatible engine or gateway")
    add("--family", default="auto", choices=["auto", *FAMILIES], help="chat template family")
    add("--served-model", help="the model's name upstream; the value of --model if left out")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8100, help="port to listen on; 0 picks a free one")
    add(FLAG, dest="append_roles", nargs="+", default=["tool"], choices=ROLES, metavar="ROLE",
        help=f"roles that agents may append after a generated answer, of {', '.join(ROLES)}")  # fmt: skip
    add("--routing-replay", action=argparse.BooleanOptionalAction, default=True, help="keep routed experts")
    add("--timeout", type=float, default=600.0, help="seconds that one answer of the engine may take")
    return parser


def serve_command(argv: Sequence[str]) -> int:
    """`pacenote serve`. Returns the exit code: 0 after a signal, 2 for what the user can put right."""
    try:
        options = vars(_parser().parse_args(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    exit_with_parent()
    roles = frozenset(options.pop("append_roles"))
    try:
        config = SessionConfig(append_roles=roles, **options)
        serve(config)
    except OSError as error:
        address = f"{options['host']}:{options['port']}"
        return _fail(f"cannot listen on {address}: {error.strerror or error}; choose another --port")
    except (ValueError, OverflowError) as error:
        return _fail(str(error))
    return 0


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(serve_command(sys.argv[1:]))
