"""`pacenote engine`: starts engines here or on a Ray cluster, registers them, and leaves nothing behind."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from pacenote.rollout.launch import Service, ServiceError, exit_with_parent, free_port
from pacenote.rollout.pool import WorkerPool
from pacenote.rollout.sglang_command import EngineSpec, embedded_command, kept, sglang_command
from pacenote.rollout.worker import ROLES
from pacenote.rollout.worker_errors import WorkerError

BACKENDS = {"sglang": sglang_command, "embedded": embedded_command}


def engine_command(argv: Sequence[str]) -> int:
    """`pacenote engine`. Returns the exit code: 0 after a signal, 1 if an engine died, 2 for what can be put right."""
    try:
        asked = _parser().parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    exit_with_parent()
    try:
        specs = [replace(_spec(asked), port=_port(asked.port, place)) for place in range(asked.replicas)]
        if asked.print:
            print("\n".join(shlex.join(BACKENDS[asked.backend](spec)) for spec in specs))
            return 0
        if asked.role == "prefill" and asked.replicas > 1:
            raise ValueError("expected one replica of a prefill engine here: each needs a bootstrap port of its own")
        with _stopping() as stop:
            return _run(asked, specs, stop)
    except (ValueError, ServiceError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(asked: argparse.Namespace, specs: list[EngineSpec], stop: threading.Event) -> int:
    with ExitStack() as stack:
        if asked.ray:
            from pacenote.rollout.ray_launch import RayEngines

            group = stack.enter_context(RayEngines(specs, backend=asked.backend, gpus=asked.gpus, address=asked.ray))
            urls, check = group.urls, group.check
        else:
            services = [stack.enter_context(_service(asked, spec)) for spec in specs]
            for service in services:
                service.wait_healthy(asked.timeout)
            urls = [service.url for service in services]

            def check() -> None:
                for service in services:
                    service.check()

        if asked.router:
            pool = stack.enter_context(WorkerPool(asked.router, weight_version=asked.weight_version))
            for url in urls:
                pool.add(url, asked.role, asked.bootstrap_port)
            pool.watch()
        for url in urls:
            print(
                f"{asked.role} engine on {url}{f', registered at {asked.router}' if asked.router else ''}", flush=True
            )
        try:
            while not stop.wait(0.5):
                check()
        except ServiceError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _service(asked: argparse.Namespace, spec: EngineSpec) -> Service:
    command = kept(BACKENDS[asked.backend](spec))
    return Service(f"{spec.role} engine", command, url=spec.url, log=asked.log_dir / f"{spec.role}-{spec.port}.log")


def _port(wanted: int, place: int) -> int:
    return wanted + place if wanted else free_port()


def _spec(asked: argparse.Namespace) -> EngineSpec:
    names = EngineSpec.__dataclass_fields__.keys() & vars(asked).keys()
    given = {name: getattr(asked, name) for name in names}
    return EngineSpec(**given | {"port": asked.port or free_port(), "extra": tuple(asked.extra)})


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Set by SIGTERM and SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    yield stop


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pacenote engine",
        description="Start SGLang engines whose routes can be trained on, here or as Ray actors. What follows -- goes "
        "to the engine as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="directory, or a name in the hub")
    add("--role", choices=ROLES, default="regular", help="whole engine, or one side of a prefill/decode pair")
    add("--backend", choices=sorted(BACKENDS), default="sglang", help="which engine")
    add("--python", default=sys.executable, help="the python that has SGLang")
    add("--host", default="0.0.0.0", help="address to listen on")
    add("--port", type=int, default=30000, help="port; more replicas take the next ones; 0 picks free ones")
    add("--bootstrap-port", type=int, help="where a prefill engine meets its decode engines")
    add("--transfer", default="mooncake", help="how keys and values travel in a pair: mooncake, mooncake_tcp, nixl")
    for name, about in (("tp", "tensor"), ("ep", "expert"), ("dp", "data")):
        add(f"--{name}", type=int, default=1, help=f"ranks of {about} parallelism")
    add("--nodes", type=int, default=1, help="machines of one engine")
    add("--node", type=int, default=0, help="which of them this is")
    add("--address", help="HOST:PORT of the first of them")
    add("--dtype", default="bfloat16", help="of weights and activations")
    add("--memory", type=float, default=0.85, help="share of a GPU's memory for weights, keys and values")
    add("--context-length", type=int, help="longest request in tokens")
    add("--max-running", type=int, help="requests that generate at once")
    add("--radix-cache", action=argparse.BooleanOptionalAction, default=True, help="keep keys and values of prefixes")
    add("--hicache", action="store_true", help="keep them in host memory, too; refused with routes")
    add("--routes", action=argparse.BooleanOptionalAction, default=True, help="return routed experts")
    add("--tool-call-parser", help="SGLang's name")
    add("--reasoning-parser", help="SGLang's name")
    add("--served-model", help="the model's name in requests")
    add("--weight-version", default="0", help="name of the first weights")
    add("--replicas", type=int, default=1, help="engines to start")
    add("--router", metavar="URL", help="register them there")
    add("--ray", nargs="?", const="auto", metavar="ADDRESS", help="as actors of a Ray cluster")
    add("--gpus", type=float, default=1.0, help="GPUs of one engine on a Ray cluster")
    add("--log-dir", type=Path, default=Path("logs"), help="a file for each engine's output")
    add("--timeout", type=float, default=1800.0, help="seconds until an engine must be healthy")
    add("--print", action="store_true", help="print the exact commands and end")
    add("extra", nargs="*", help=argparse.SUPPRESS)
    return parser
