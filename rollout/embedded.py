"""The embedded engine as a process: SGLang's protocol for a small transformers mixture-of-experts model.

    python -m pacenote.rollout.embedded --model-path DIR --port 30000

One thread generates (`embedded_engine`), the event loop answers (`embedded_app`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import uvicorn
from transformers.utils import logging as transformers_logging

from pacenote.rollout.embedded_app import EngineConfig, create_engine_app
from pacenote.rollout.embedded_engine import Engine
from pacenote.rollout.embedded_model import DTYPES, ModelError, Runner
from pacenote.rollout.launch import exit_with_parent
from pacenote.rollout.toolcalls import REASONING_PARSERS, TOOL_CALL_PARSERS


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


def parse_arguments(arguments: Sequence[str]) -> EngineConfig:
    """Command line -> config; prints usage and exits with code 2 on bad options."""
    parser = argparse.ArgumentParser(
        prog="python -m pacenote.rollout.embedded",
        description="Serve a small mixture-of-experts model over SGLang's HTTP protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="directory with config.json, weights and tokenizer")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=30000, help="port to listen on")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of weights and activations")
    add("--device", default="cpu", help="torch device")
    add("--max-running-requests", type=int, default=64, help="requests that generate at once")
    add("--context-length", type=int, help="longest request in tokens; the model's own limit if left out")
    add("--max-prefill-tokens", type=int, default=4096, help="prompt tokens in one prefill, padding counted")
    add("--tool-call-parser", choices=TOOL_CALL_PARSERS, help="take tool calls out of the text")
    add("--reasoning-parser", choices=REASONING_PARSERS, help="take reasoning out of the text")
    add("--served-model-name", help="name in answers; the model path if left out")
    add("--random-seed", type=int, default=0, help="seed of requests without one")
    add("--weight-version", default="default", help="version name of the first weights")
    add("--experts-implementation", choices=("auto", "eager", "grouped_mm", "batched_mm"), default="auto")
    add("--threads", type=int, default=1, help="CPU threads of torch")
    parsed = parser.parse_args(arguments)
    try:
        return EngineConfig(**vars(parsed))
    except ValueError as error:
        parser.error(str(error))


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
