"""The session server: OpenAI chat in, exact tokens, logprobs and routes kept. See docs/protocol.md.

    python -m pacenote.rollout.server --model DIR --upstream http://127.0.0.1:30000

Options, the application, and the command line; the handlers are in `front`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from pacenote.replay.errors import ReplayError
from pacenote.replay.spec import RoutingGeometry, geometry_from_config
from pacenote.rollout import processes, serving
from pacenote.rollout.auth import Guard, Keys
from pacenote.rollout.dialects import Dialects
from pacenote.rollout.errors import SessionError, StartupError
from pacenote.rollout.front import Front, own_version, refuse, refuse_bug, refuse_path
from pacenote.rollout.info import Info
from pacenote.rollout.limits import BodyLimit, sweep
from pacenote.rollout.linear import POLICIES
from pacenote.rollout.matching import Match, check_name
from pacenote.rollout.messages import ROLES
from pacenote.rollout.openapi import document, openapi_route
from pacenote.rollout.pairs import AUTO, Pair
from pacenote.rollout.proxy import Proxy
from pacenote.rollout.quota import UNBOUNDED, Quota
from pacenote.rollout.request_limits import USUAL, RequestLimits
from pacenote.rollout.request_log import FORMATS, RequestLog, configure
from pacenote.rollout.share import WHOLE, Share
from pacenote.rollout.store import SessionStore, check_store, open_store
from pacenote.rollout.template import Template

_PROBE = ("The quick brown fox", "naïve Straße", "路由", "0123456789", "\t  def f(x): return x", "<|user|><|im_start|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """Options of the session server.

    Attributes:
        model: directory with tokenizer and config.json, or a model's name in the local hub cache.
        upstream: base URL of an SGLang-compatible engine or gateway.
        family: chat template family; "auto" goes by the vocabulary and the template's text.
        chat_template: a template file to use instead of the tokenizer's own.
        trust_remote_code: run the code that some models bring for their tokenizer.
        served_model: the model's name upstream; None takes `model`.
        append_roles: roles that agents may append after a generated answer.
        routing_replay: ask for routed experts and keep them.
        host, port: address to listen on.
        timeout: seconds that one answer of the engine may take.
        policy: "tree": what does not extend the history branches off; "linear": it is refused.
        match: when two messages are the same, see `rollout.matching`.
        store: where sessions live: "memory", or "sqlite:PATH" to outlive the process.
        auth: "off" (on a loopback host only) or "tokens".
        tokens: admin tokens for auth "tokens".
        session_ttl: seconds after which a session that nobody uses is forgotten; None keeps it.
        max_body: bytes of a request's body.
        limits: how much one request may ask for.
        quota: how much all processes together may hold.
        pairs: prefill/decode pairs to drive instead of asking `upstream`, each PREFILL_URL,BOOTSTRAP_PORT,DECODE_URL;
            or "auto" alone: those that the gateway at `upstream` lists.
        probe: answer no chat before the way to the engine was seen to lose nothing.
        workers: processes behind the port; `create_app` makes the application of one.
        log: lines on stderr for each request and answered chat: "off", "text" or "json".
        log_content: show in the lines what was said, too.
        drain: seconds that answers in flight have to end in, after SIGTERM.

    Raises:
        ValueError: a value that cannot be.
    """

    model: str
    upstream: str
    family: str = "auto"
    chat_template: Path | None = None
    trust_remote_code: bool = False
    served_model: str | None = None
    append_roles: frozenset[str] = frozenset({"tool"})
    routing_replay: bool = True
    host: str = "127.0.0.1"
    port: int = 8100
    timeout: float = 600.0
    policy: str = "tree"
    match: str = "strict"
    store: str = "memory"
    auth: str = "off"
    tokens: tuple[str, ...] = field(default=(), repr=False)
    session_ttl: float | None = None
    max_body: int = 64 << 20
    limits: RequestLimits = USUAL
    quota: Quota = UNBOUNDED
    pairs: tuple[str, ...] = ()
    probe: bool = False
    workers: int = 1
    log: str = "off"
    log_content: bool = False
    drain: float = 30.0

    def __post_init__(self) -> None:
        if not self.upstream.startswith(("http://", "https://")):
            raise ValueError(f"expected upstream as an http:// or https:// URL, got {self.upstream!r}")
        wrong = sorted(set(self.append_roles) - set(ROLES))
        if wrong:
            raise ValueError(f"expected append roles of {', '.join(ROLES)}, got {', '.join(wrong)}")
        if self.policy not in POLICIES:
            raise ValueError(f"expected a policy of {', '.join(POLICIES)}, got {self.policy!r}")
        check_name(self.match)
        if not self.timeout > 0:
            raise ValueError(f"expected a timeout above 0 seconds, got {self.timeout}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"expected a port in 0..65535, got {self.port}")
        check_store(self.store)
        if self.session_ttl is not None and not self.session_ttl > 0:
            raise ValueError(f"expected a session ttl above 0 seconds, got {self.session_ttl}")
        if self.pairs != (AUTO,):
            for pair in self.pairs:
                Pair.read(pair)
        if self.log not in FORMATS:
            raise ValueError(f"expected a log of {', '.join(FORMATS)}, got {self.log!r}")
        if not self.drain >= 0:
            raise ValueError(f"expected a drain of 0 seconds or more, got {self.drain}")
        for name, value in (("max body", self.max_body), ("number of workers", self.workers)):
            if value < 1:
                raise ValueError(f"expected a {name} of at least 1, got {value}")
        self._check_auth()

    def _check_auth(self) -> None:
        if self.auth == "tokens":
            Keys(self.tokens)
        elif self.auth != "off":
            raise ValueError(f"expected auth of off or tokens, got {self.auth!r}")
        elif not _is_loopback(self.host):
            raise ValueError(
                f"auth off is for loopback hosts, got host {self.host}: whoever reaches the port could read and delete "
                "every session; use --auth tokens"
            )


def load_front(
    config: SessionConfig, *, store: SessionStore | None = None, share: Share = WHOLE, instance: str = ""
) -> Front:
    """The handlers, with everything that has to be read for them. Arguments and errors as `create_app`."""
    template = Template.load(
        config.model,
        family=config.family,
        append_roles=config.append_roles,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )
    geometry = load_geometry(config.model) if config.routing_replay else None
    match = Match.load(config.match)
    keys = Keys(config.tokens) if config.auth == "tokens" else None
    if store is None:
        store = open_store(config.store, share=share, subject=_subject(template, geometry, match), quota=config.quota)
    return Front(config, template, geometry, store, match=match, keys=keys, instance=instance)


def create_app(
    config: SessionConfig, *, store: SessionStore | None = None, share: Share = WHOLE, instance: str = ""
) -> Starlette:
    """The ASGI application. Loads the tokenizer, the model's config and the journal now.

    Args:
        config: options; host, port and workers are the caller's business.
        store: where sessions live; `config.store` if left out. It is closed with the application.
        share: the part of all sessions that is this process's.
        instance: what /health calls the server; drawn if left out.

    Raises:
        StartupError: the model has no usable tokenizer, template or routing, or the journal or the function of
            `config.match` cannot be used.
    """
    front = load_front(config, store=store, share=share, instance=instance)
    store, keys = front.store, front.keys
    proxy = Proxy(config.upstream, timeout=config.timeout, find=store.find, limits=config.limits)
    routes = [
        Route("/health", front.health, methods=["GET"]),
        openapi_route(document(version=own_version(), guarded=keys is not None, limits=config.limits)),
        Route("/metrics", front.show_metrics, methods=["GET"]),
        Route("/sessions", front.create, methods=["POST"]),
        Route("/sessions/{session_id}", front.create, methods=["PUT"]),
        Route("/sessions/{session_id}", front.show, methods=["GET"]),
        Route("/sessions/{session_id}", front.delete, methods=["DELETE"]),
        Route("/sessions/{session_id}/samples", front.samples, methods=["POST"]),
        Route("/sessions/{session_id}/v1/chat/completions", front.chat, methods=["POST"]),
        *Dialects(front.chat, front.count, front.template.decode, config.limits).routes(),
        *Info(config.served_model or config.model, store).routes(),
    ]
    handlers: Any = {SessionError: refuse, HTTPException: refuse_path, Exception: refuse_bug}
    middleware = [Middleware(RequestLog, failed=front.metrics.failed)]
    middleware += [Middleware(Guard, keys=keys)] if keys else []
    middleware.append(Middleware(BodyLimit, limit=config.max_body))
    app = Starlette(
        routes=routes,
        lifespan=_lifespan(config, front, store, proxy),
        exception_handlers=handlers,
        middleware=middleware,
    )
    app.router.default = proxy
    return app


def _lifespan(
    config: SessionConfig, front: Front, store: SessionStore, proxy: Proxy
) -> Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(store.close)
            stack.push_async_callback(proxy.close)
            await stack.enter_async_context(front.lifespan(app))
            if config.session_ttl is not None:
                stack.callback(asyncio.create_task(sweep(store, config.session_ttl, front.busy, front.forget)).cancel)
            yield

    return lifespan


def _subject(template: Template, geometry: RoutingGeometry | None, match: Match) -> str:
    """What tells a journal of this model from one whose tokens, rows or keys of messages mean something else."""
    matched = "" if match.name == "strict" else f", match {match.name}"
    ids = template.encode("\n".join(_PROBE))[0]
    tokenizer = blake2b(repr(ids).encode(), digest_size=6).hexdigest()
    if geometry is None:
        return f"tokenizer {tokenizer}, no routes{matched}"
    layers = blake2b(repr(geometry.layers).encode(), digest_size=6).hexdigest()
    return (
        f"tokenizer {tokenizer}, {len(geometry.layers)} layers ({layers}) of {geometry.num_experts} experts, "
        f"{geometry.top_k} a token{matched}"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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


def serve(config: SessionConfig) -> None:
    """Answer until SIGTERM or SIGINT.

    Raises:
        OSError: the address cannot be had (found out before anything is loaded).
        StartupError: see `create_app`.
    """
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        url = f"http://{config.host}:{listener.getsockname()[1]}"
        ready = functools.partial(print, f"sessions on {url}, engine {config.upstream}", flush=True)
        if config.workers == 1:
            _serve_share(config, "", WHOLE, listener, ready)
        else:
            work = functools.partial(_serve_share, config, uuid.uuid4().hex)
            processes.run(work, listener, count=config.workers, ready=ready, drain=config.drain)


def _serve_share(
    config: SessionConfig, instance: str, share: Share, listener: socket.socket, ready: Callable[[], None]
) -> None:
    configure(config.log)
    app = create_app(config, share=share, instance=instance)
    listener.listen(serving.BACKLOG)  # whoever is told that it is ready may connect
    ready()
    serving.run(app, listener, drain=config.drain)


if __name__ == "__main__":
    from pacenote.rollout.serve_cli import serve_command

    sys.exit(serve_command(sys.argv[1:]))
