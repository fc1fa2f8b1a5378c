"""The embedded engine as a process: SGLang's protocol for a small transformers mixture-of-experts model.

    python -m pacenote.rollout.embedded --model-path DIR --port 30000

One thread generates (`embedded_engine`), the event loop answers (`embedded_app`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import torch
import uvicorn
from transformers.utils import logging as transformers_logging

from pacenote.rollout.embedded_app import create_engine_app
from pacenote.rollout.embedded_config import EngineConfig, parse_arguments
from pacenote.rollout.embedded_engine import Engine
from pacenote.rollout.embedded_model import ModelError, Runner
from pacenote.rollout.launch import exit_with_parent


class _Server(uvicorn.Server):
    """uvicorn that ends at once on SIGTERM and SIGINT: open requests are aborted, not waited for."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        yield

    def _end(self) -> None:
        self.should_exit = True
        self._engine.abort(None)


def serve(config: EngineConfig) -> None:
    """Load the model and answer until SIGTERM or SIGINT.

    Raises:
        OSError: the port cannot be had (found out before the model is loaded).
        ModelError: the model cannot be served.
    """
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        torch.set_num_threads(config.threads)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        runner = Runner(
            config.model_path,
            dtype=config.dtype,
            device=config.device,
            slots=config.max_running_requests,
            context_length=config.context_length,
            experts=config.experts_implementation,
            exact=config.exact,
        )
        engine = Engine(runner, weight_version=config.weight_version, prefill_tokens=config.max_prefill_tokens)
        # Every torch call gives up the interpreter lock: waiting the usual 5 ms for it would stall a step of 200 calls.
        sys.setswitchinterval(2e-4)
        app = create_engine_app(config, runner, engine)
        options = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_keep_alive=75, timeout_graceful_shutdown=2
        )
        asyncio.run(_Server(options, engine).serve(sockets=[listener]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 after a signal, 2 for what the user can put right."""
    exit_with_parent()
    config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        serve(config)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot listen on {config.host}:{config.port}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
