"""A session server for a while among retries, disconnects, failing engines and kills; what must not happen is checked.

    python -m benchmarks.soak --minutes 5 --sessions 300 --tokens 32768

Agents chat with Idempotency-Keys, send again what was not answered, leave half way and ask anew, collect and delete
their sessions and start others; one answer of the engine in a hundred fails. The first half of the time nothing is
killed, so that memory can be compared: what is left for each session that has ended. In the second half engine and
server are killed with SIGKILL in turn, and started again.

At a collection every turn that the agent has an answer for must be there, once, with the ids, logprobs and rows that
the engine generated for a prompt of that length. Exit status 1: one was lost or changed, a request had another error
than those of something that is down, /health failed, or memory grew by more than `--growth` bytes an ended session.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvloop

from benchmarks.scripted_engine import DENSE, Script
from benchmarks.session_load import Agent, Connection, health_watched
from benchmarks.sessions import Case, machine, memory, model_directory, processes, quantile, running, write
from pacenote.rollout.launch import Service
from pacenote.rollout.samples import decode_samples
from pacenote.rollout.trajectory import Trajectory

SCRIPT = Script()
PASSING = {0, 502, 503}
"""What may come while something is down: 0 is a connection that broke off."""


@dataclass
class Seen:
    """What all agents together have seen.

    Attributes:
        seconds: of each turn that was answered at the first try.
        statuses: how often each came.
        turns, sessions: answered turns; sessions that were collected, checked and deleted.
        wrong: what must not have been.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    turns: int = 0
    sessions: int = 0
    wrong: list[str] = field(default_factory=list)


class Walker:
    """One agent after the other.

    Args:
        name: first part of its sessions' ids.
        port: the server's.
        tokens, turns: of the longest session.
        seen: where to note things.
    """

    def __init__(self, name: str, port: int, *, tokens: int, turns: int, seen: Seen) -> None:
        self._name, self._port, self._turns, self._seen = name, port, turns, seen
        self._words = max(1, (tokens // turns - SCRIPT.generated) * 10 // 67)
        self._random = random.Random(name)
        self._connection = Connection(port)

    async def walk(self, end: float) -> None:
        """Sessions until a time of the loop's clock, at least one; each is brought to its end."""
        loop, count = asyncio.get_running_loop(), 0
        while not count or loop.time() < end:
            await self._session(Agent(f"{self._name}-{count}", self._words), end)
            count += 1
        self._connection.close()

    async def _session(self, agent: Agent, end: float) -> None:
        loop, starts, whole = asyncio.get_running_loop(), list[int](), list[int]()
        for turn in range(self._random.randint(1, self._turns)):
            body = agent.body(turn)
            if self._random.random() < 0.03:
                await self._leave(agent, body)
            choice = await self._answer(agent, body, turn)
            starts.append(len(choice["prompt_token_ids"]))
            whole = [*choice["prompt_token_ids"], *choice["token_ids"]]
            agent.heard(body)
            if turn and loop.time() > end:
                break
        samples = decode_samples(await self._ask("POST", f"/sessions/{agent.name}/samples"))
        self._seen.wrong += [f"{agent.name}: {text}" for text in faulty(samples, starts, whole)]
        await self._ask("DELETE", f"/sessions/{agent.name}")
        self._seen.sessions += 1

    async def _answer(self, agent: Agent, body: bytes, turn: int) -> dict[str, Any]:
        """The choice that answers a turn, however often it has to be sent."""
        began, path = time.perf_counter(), f"/sessions/{agent.name}/v1/chat/completions"
        tries = Counter[int]()
        data = await self._ask("POST", path, body, f"idempotency-key: {agent.name}-{turn}\r\n", tries)
        if tries.total() == 1:
            self._seen.seconds.append(time.perf_counter() - began)
        self._seen.turns += 1
        choice: dict[str, Any] = orjson.loads(data)["choices"][0]
        return choice

    async def _ask(
        self, method: str, path: str, body: bytes = b"", headers: str = "", tries: Counter[int] | None = None
    ) -> bytes:
        """Ask until there is an answer."""
        for _ in range(1200):
            try:
                status, data = await self._connection.ask(method, path, body, headers)
            except ConnectionError:
                status, data = 0, b""
            for counter in (self._seen.statuses, Counter[int]() if tries is None else tries):
                counter[status] += 1
            if status in (200, 204):
                return data
            if status not in PASSING:
                self._seen.wrong.append(f"{method} {path}: {status} {data[:300]!r}")
            await asyncio.sleep(0.1)
        raise RuntimeError(f"{method} {path} was never answered")

    async def _leave(self, agent: Agent, body: bytes) -> None:
        """Send a request and close the connection before its answer."""
        connection = Connection(self._port)
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(self._random.random() * 0.05):
                await connection.ask("POST", f"/sessions/{agent.name}/v1/chat/completions", body)
        await connection.leave()  # while both wait, two equal requests are two samples


def faulty(samples: Sequence[Trajectory], starts: Sequence[int], whole: Sequence[int]) -> list[str]:
    """What is wrong with a session's samples.

    Args:
        samples: collected.
        starts: tokens of the prompts that an agent has answers for.
        whole: ids of the last of them and of its answer.
    """
    wrong, known = list[str](), Counter[int]()
    for sample in samples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask, [0]]).astype(np.int8)))
        for start, stop in edges.reshape(-1, 2).tolist():
            known[start] += 1
            same = np.array_equal(sample.logprobs[start:stop], np.array(SCRIPT.logprobs(start), dtype=np.float32))
            if sample.tokens[start:stop].tolist() != SCRIPT.ids(start) or not same:
                wrong.append(f"the answer at {start} has other ids or logprobs than were generated")
        assert sample.experts is not None
        if not np.array_equal(sample.experts, SCRIPT.rows[: len(sample.tokens) - 1, DENSE:]):
            wrong.append("rows are not those that were generated")
    wrong += [f"the answer at {start} is there {known[start]} times" for start in starts if known[start] != 1]
    if [*whole] not in [sample.tokens.tolist() for sample in samples]:
        wrong.append("its last answer is in no sample")
    return wrong


async def kill_in_turn(victims: Sequence[Service], every: float, end: float) -> int:
    """SIGKILL one after the other and start it again, until a time of the loop's clock; returns the kills."""
    loop, count = asyncio.get_running_loop(), 0
    while loop.time() + every < end:
        await asyncio.sleep(every)
        victim = victims[count % len(victims)]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        while victim.alive:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(victim.start)
        await asyncio.to_thread(victim.wait_healthy, 120)
        count += 1
    return count


async def soak(server: Service, engine: Service, asked: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """(results, what was wrong)."""
    loop, port = asyncio.get_running_loop(), int(server.url.rpartition(":")[2])
    seen = Seen()

    async def phase(name: str, seconds: float) -> float:
        end = loop.time() + seconds
        options = {"tokens": asked.tokens, "turns": asked.turns, "seen": seen}
        async with asyncio.TaskGroup() as group:
            for number in range(asked.sessions):
                group.create_task(Walker(f"{name}-{number}", port, **options).walk(end))
            kills = group.create_task(kill_in_turn([engine, server], asked.kill_every, end)) if name == "wild" else None
        return 0 if kills is None else kills.result()

    quarter = asked.minutes * 15
    await phase("first", quarter)  # what a process comes to in any case is no growth
    before, ended = memory(processes(server)), seen.sessions
    async with health_watched(port) as health:
        await phase("calm", quarter)
    growth = (memory(processes(server)) - before) / (seen.sessions - ended)
    calm = sorted(seen.seconds)
    peak = memory(processes(server), "VmHWM")
    kills = await phase("wild", 2 * quarter)
    row = {
        "turns": seen.turns,
        "sessions_ended": seen.sessions,
        "kills": kills,
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "turn_ms_p50": quantile(calm, 0.5) * 1e3,
        "turn_ms_p99": quantile(calm, 0.99) * 1e3,
        "health_ms_p99": quantile(health, 0.99) * 1e3,
        "rss_mb_peak": peak / 1e6,
        "bytes_per_ended_session": growth,
        "wrong": len(seen.wrong),
    }
    if growth > asked.growth:
        seen.wrong.append(f"memory grew by {growth:.0f} bytes for each session that ended")
    return row, seen.wrong


def main(words: Sequence[str] | None = None) -> int:
    """Soak, say what was seen, write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=5.0)
    add("--sessions", type=int, default=300, help="agents at once")
    add("--tokens", type=int, default=8192, help="of the longest session")
    add("--turns", type=int, default=20, help="of the longest session")
    add("--workers", type=int, default=1, help="processes of the server")
    add("--kill-every", type=float, default=20.0, metavar="SECONDS")
    add("--growth", type=float, default=20_000.0, metavar="BYTES", help="for each ended session, at most")
    add("--out", type=Path, help="folder for the JSON; none: it is only printed")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        case = Case(
            sessions=asked.sessions, turns=asked.turns, tokens=asked.tokens, store="sqlite", workers=asked.workers
        )
        folder = Path(scratch) / "soak"
        folder.mkdir()
        with running(model_directory(Path(scratch) / "model"), folder, case, failing=0.01) as (server, engine):
            row, wrong = runner.run(soak(server, engine, asked))
    shape = {name: getattr(asked, name) for name in ("minutes", "sessions", "tokens", "turns", "workers", "kill_every")}
    print(json.dumps(shape | row))
    for text in wrong[:20]:
        print(f"WRONG: {text}")
    if asked.out is not None:
        print("written:", write(asked.out, "soak", machine(), [shape | row]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
