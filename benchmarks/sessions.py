"""What a session server takes: turns a second, CPU a turn, memory, the time that is its own, /health under load.

    python -m benchmarks.sessions --out benchmarks/results

The real `pacenote serve` in a process of its own, in front of a scripted engine that answers at once (rows of 46 layers
x top-4, only the new ones), under agents that all chat at the same time. Server, engine and agents share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.machine import commit
from benchmarks.scripted_engine import DENSE, EXPERTS, LAYERS, TOP_K, Script
from benchmarks.session_load import Agent, Connection, health_watched
from pacenote.rollout.launch import Service, free_port, sessions_command

HERTZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """So many sessions of so many turns, up to so many tokens; the engine's delay, the store, the processes."""

    sessions: int
    turns: int
    tokens: int
    delay: float = 0.0
    store: str = "memory"
    workers: int = 1


CASES = (
    Case(sessions=32, turns=20, tokens=8192),
    Case(sessions=32, turns=20, tokens=8192, store="sqlite"),
    Case(sessions=32, turns=20, tokens=8192, store="sqlite", workers=2),
    Case(sessions=32, turns=20, tokens=8192, delay=1.0, store="sqlite"),
    Case(sessions=64, turns=20, tokens=8192, store="sqlite"),
    Case(sessions=128, turns=20, tokens=8192, store="sqlite"),
    Case(sessions=256, turns=20, tokens=8192, store="sqlite"),
    Case(sessions=512, turns=20, tokens=8192, store="sqlite"),
    Case(sessions=64, turns=20, tokens=32768, store="sqlite"),
    Case(sessions=64, turns=20, tokens=65536, store="sqlite"),
    Case(sessions=128, turns=20, tokens=32768, delay=2.0, store="sqlite"),
)


def model_directory(folder: Path) -> Path:
    """A directory with the tiny model's tokenizer, and GLM-4.7-Flash's routing in its config."""
    from pacenote.trainer.model import build_tiny

    build_tiny(folder, seed=0)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "num_hidden_layers": LAYERS, "first_k_dense_replace": DENSE, "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "mlp_layer_types": ["dense"] * DENSE + ["sparse"] * (LAYERS - DENSE),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def running(model: Path, folder: Path, case: Case, *, failing: float = 0.0) -> Iterator[tuple[Service, Service]]:
    """(server, engine), each a process of its own; so large a share of the engine's answers fails."""
    with ExitStack() as stack:
        engine_port, port = free_port(), free_port()
        command = [sys.executable, "-m", "benchmarks.scripted_engine", "--port", str(engine_port)]
        command += ["--delay", str(case.delay), "--failing", str(failing)]
        engine = Service("engine", command, url=f"http://127.0.0.1:{engine_port}", log=folder / "engine.log")
        store = "memory" if case.store == "memory" else f"sqlite:{folder / 'journal'}"
        options = ["--store", store, "--workers", str(case.workers), "--log", "off", "--no-probe"]
        options += ["--tito-allowed-append-roles", "user", "tool"]
        command = sessions_command(model, upstream=engine.url, port=port, extra=options)
        server = Service("sessions", command, url=f"http://127.0.0.1:{port}", log=folder / "sessions.log")
        for service in (engine, server):
            stack.enter_context(service)
            service.wait_healthy(60)
        yield server, engine


def processes(service: Service) -> list[int]:
    """The service's process and those that it has started."""
    found, rest = list[int](), [service.pid or 0]
    while rest:
        found.append(pid := rest.pop())
        rest += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """Of all threads, user and system."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / HERTZ


def memory(pids: Sequence[int], name: str = "VmRSS") -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return sum(int(re.findall(rf"{name}:\s*(\d+) kB", text)[0]) for text in texts) * 1024


async def chat(agent: Agent, port: int, turns: int, seen: list[float]) -> None:
    """All turns of one agent; seconds of each go to `seen`."""
    connection = Connection(port)
    for turn in range(turns):
        body = agent.body(turn)
        began = time.perf_counter()
        status, said = await connection.ask("POST", f"/sessions/{agent.name}/v1/chat/completions", body)
        seen.append(time.perf_counter() - began)
        assert status == 200, said[:500]
        agent.heard(body)
    connection.close()


async def measure(case: Case, server: Service) -> dict[str, Any]:
    """The row of a case."""
    port, pids = int(server.url.rpartition(":")[2]), processes(server)
    words = max(1, (case.tokens // case.turns - Script().generated) * 10 // 67)  # of the tiny tokenizer's tokens
    agents = [Agent(f"session-{number:04}", words) for number in range(case.sessions)]
    before, cpu = memory(pids), cpu_seconds(pids)
    seen: list[float] = []
    async with health_watched(port) as health:
        began = time.perf_counter()
        await asyncio.gather(*(chat(agent, port, case.turns, seen) for agent in agents))
        seconds, cpu = time.perf_counter() - began, cpu_seconds(pids) - cpu
    connection = Connection(port)
    _, metrics = await connection.ask("GET", "/metrics")
    own = [
        float(re.findall(rf"pacenote_own_seconds_{name} ([\d.e+-]+)", metrics.decode())[0]) for name in ("sum", "count")
    ]
    held = float(re.findall(r"pacenote_held_bytes ([\d.e+-]+)", metrics.decode())[0])
    reads: dict[str, float] = {}
    for name, ask in (("show", ("GET", "")), ("samples", ("POST", "/samples"))):
        start = time.perf_counter()
        _, said = await connection.ask(ask[0], f"/sessions/{agents[0].name}{ask[1]}")
        reads |= {f"{name}_bytes": len(said), f"{name}_ms": (time.perf_counter() - start) * 1e3}
        if name == "show":
            tokens = len(json.loads(said)["metadata"]["accumulated_token_ids"])
    return {
        "turns_per_s": len(seen) / seconds,
        "cpu_ms_per_turn": cpu / len(seen) * 1e3,
        "own_ms_mean": own[0] / own[1] * 1e3,
        "turn_ms_p50": quantile(seen, 0.5) * 1e3,
        "turn_ms_p99": quantile(seen, 0.99) * 1e3,
        "over_engine_ms_p50": (quantile(seen, 0.5) - case.delay) * 1e3,
        "over_engine_ms_p99": (quantile(seen, 0.99) - case.delay) * 1e3,
        "health_ms_p50": quantile(health, 0.5) * 1e3,
        "health_ms_p99": quantile(health, 0.99) * 1e3,
        "rss_mb_idle": before / 1e6,
        "rss_mb_peak": memory(pids, "VmHWM") / 1e6,
        "held_mb": held / 1e6,
        "tokens_per_session": tokens,
        **reads,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def machine() -> dict[str, Any]:
    """What the rows were measured on."""
    model = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "device": "cpu",
        "processor": model[0] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("aiohttp", "orjson", "starlette", "tokenizers", "transformers", "uvicorn")},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "note": "server, engine and agents share the cores",
    }


def write(out: Path, name: str, facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    """The rows as JSON, a line each."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-cpu-{facts['date'].replace('-', '')}.json"
    lines = ",\n  ".join(json.dumps(rounded(row)) for row in rows)
    path.write_text(json.dumps({"machine": facts}, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')
    return path


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the eye: two digits after the point."""
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}


def run(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """Start, measure, stop."""
    folder.mkdir()
    with running(model, folder, case) as (server, _), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(case, server))


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sessions", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cases", type=int, nargs="+", help=f"numbers of cases, 0..{len(CASES) - 1}; all if left out")
    asked = parser.parse_args(words)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = model_directory(Path(scratch) / "model")
        for number in asked.cases or range(len(CASES)):
            case = CASES[number]
            rows.append({**asdict(case), **run(case, model, Path(scratch) / str(number))})
            print(json.dumps(rounded(rows[-1])), flush=True)
    print("written:", write(asked.out, "sessions", machine(), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
