"""The session server: OpenAI chat in, exact tokens, logprobs and routes kept. See docs/protocol.md.

    python -m pacenote.rollout.server --model DIR --upstream http://127.0.0.1:30000

Options, the application, and the command line; the handlers are in `front`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from pacenote.replay.errors import ReplayError
from pacenote.replay.spec import RoutingGeometry, geometry_from_config
from pacenote.rollout.errors import SessionError, StartupError
from pacenote.rollout.front import Front, refuse, refuse_bug, refuse_path
from pacenote.rollout.launch import exit_with_parent
from pacenote.rollout.messages import ROLES
from pacenote.rollout.store import MemoryStore, SessionStore
from pacenote.rollout.template import FAMILIES, Template
from pacenote.rollout.tito import FLAG


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
    front = Front(config, template, geometry, store if store is not None else MemoryStore())
    routes = [
        Route("/health", front.health, methods=["GET"]),
        Route("/sessions", front.create, methods=["POST"]),
        Route("/sessions/{session_id}", front.show, methods=["GET"]),
        Route("/sessions/{session_id}", front.delete, methods=["DELETE"]),
        Route("/sessions/{session_id}/samples", front.samples, methods=["POST"]),
        Route("/sessions/{session_id}/v1/models", front.models, methods=["GET"]),
        Route("/sessions/{session_id}/v1/chat/completions", front.chat, methods=["POST"]),
    ]
    handlers: Any = {SessionError: refuse, HTTPException: refuse_path, Exception: refuse_bug}
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
        listener.listen(2048)  # whoever reads the next line may connect
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
