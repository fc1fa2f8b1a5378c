"""Kills a session server's insides with SIGKILL at a chosen step, and looks at what is left.

    python -m tests.rollout.crash FOLDER --model DIR --by line|opcode|sqlite --kills N [--seed S]

Each kill is a forked process that plays `STEPS` (chats, a retry, choices, a deletion, a session that a chat starts) on
a journal of its own and is killed at its K-th line or bytecode instruction of the code between an engine's answer and
the client's, in whichever thread, or at SQLite's K-th virtual machine instruction. What it said to be done by then is
what a client may have seen. A second process then opens the journal and goes on with the steps that are missing.

Checked: the journal is the state after what was said, or after one step more, whole, to the last bit; and once the rest
of the steps is played, everything is as if nothing had been killed. SIGKILL inside a system call leaves a first part
of what it writes: `test_journal` cuts the log anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import pickle
import random
import signal
import sqlite3
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from pacenote.rollout import (
    chat,
    completion,
    journal,
    journal_entry,
    journal_file,
    journal_store,
    linear,
    memory_store,
    session,
    turn,
)  # fmt: skip
from pacenote.rollout.chat import Chats
from pacenote.rollout.errors import SessionGone
from pacenote.rollout.journal import Journal
from pacenote.rollout.journal_store import JournalStore
from pacenote.rollout.messages import ROLES
from pacenote.rollout.samples import encode_samples
from pacenote.rollout.session import Session
from pacenote.rollout.sglang import Engine
from pacenote.rollout.template import Template
from tests.rollout.conftest import GEOMETRY, sglang_answer

_MODULES = [chat, completion, journal, journal_entry, journal_file, journal_store, linear, memory_store, session, turn]
WATCHED = frozenset(str(module.__file__) for module in _MODULES)
"""Where a kill may fall, by line or instruction."""
STEPS = ("create", "first", "second", "again", "choices", "other", "third", "delete", "fourth")
State = tuple[Any, ...]
Message = Mapping[str, Any]


class _Engine(Engine):
    """Answers by the number of the step, so that a step that is played again gets the same."""

    def __init__(self) -> None:
        self.step = 0
        self._choices = itertools.count()

    async def chat(self, body: bytes, *, session: str = "") -> bytes:
        sampled = [40 + self.step, 50 + next(self._choices), 60]
        answer = sglang_answer(json.loads(body), sampled, text=f"answer {self.step}", version=str(self.step))
        logprobs = [[-(self.step * 16 + place + 1) / 1024, id, None] for place, id in enumerate(sampled)]
        answer["choices"][0]["meta_info"]["output_token_logprobs"] = logprobs
        return json.dumps(answer).encode()

    def at(self, step: int) -> None:
        self.step, self._choices = step, itertools.count()


class Play:
    """The steps, on a journal."""

    def __init__(self, template: Template, path: Path) -> None:
        self.engine = _Engine()
        self.store = JournalStore(Journal(path))
        self._names = Names()
        self._said: dict[int, dict[str, Any]] = {}
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._chats = Chats(
            template=template, geometry=GEOMETRY, append_roles=frozenset(ROLES), model="m", store=self.store,
            engine=self.engine, threads=self._threads,
        )  # fmt: skip

    async def step(self, number: int) -> None:
        """One of STEPS, to its end; the same whoever plays it and when."""
        self.engine.at(number)
        self._names.at(number)
        name = STEPS[number]
        if name == "create":
            await self.store.create()
        elif name == "delete":
            await self.store.delete("other")
        elif name == "other":
            await self._chat("other", [_user("o")])
        elif name == "choices":
            await self._chat(_MAIN, [_user("c")], n=2, seed=1)
        elif name in ("first", "again"):
            await self._chat(_MAIN, [_user("a")])
        else:
            await self._chat(_MAIN, self._history(name))

    def _history(self, name: str) -> list[Message]:
        """A request that goes on from the answer of the step before it that did, as the journal has it."""
        held = self.store.find(_MAIN)
        assert held is not None
        before = {"second": "first", "third": "again", "fourth": "third"}[name]
        [line] = [t.line() for t in held.turns if t.answer.message.raw["content"] == f"answer {STEPS.index(before)}"]
        messages = [message.raw for turn in line for message in (*turn.prompt.appended, turn.answer.message)]
        return [*messages, _user(name)]

    async def _chat(self, session_id: str, messages: list[Message], **fields: Any) -> None:
        await self._chats.complete(session_id, {"messages": messages, **fields})

    def state(self) -> State:
        """All that can be collected of both sessions."""
        return tuple(_outside(self.store, id) for id in (_MAIN, "other"))

    async def close(self) -> None:
        """Let go of the journal."""
        self._threads.shutdown()
        await self.store.close()


class Names:
    """Drawn ids and the clock, by the number of the step: what is played again gets the same."""

    def __init__(self) -> None:
        self._drawn = itertools.count()
        self._step = 0
        uuid.uuid4 = lambda: uuid.UUID(int=self._step << 64 | next(self._drawn))
        time.time = lambda: 1000.0 + self._step

    def at(self, step: int) -> None:
        self._step, self._drawn = step, itertools.count()


_MAIN = uuid.UUID(int=0).hex


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _outside(held: JournalStore, id: str) -> object:
    try:
        found = held.find(id)
    except SessionGone as error:
        return error.code
    return None if found is None else _seen(found)


def _seen(found: Session) -> State:
    samples = [encode_samples(found.trajectories(include_superseded=every)) for every in (False, True)]
    return found.created, found.recovered, found.records(), found.accumulated_token_ids(), samples


def states(template: Template, path: Path) -> list[State]:
    """What there is after no step, after the first, and so on."""
    with asyncio.Runner() as runner:
        play = Play(template, path)
        found = [play.state()]
        for number in range(len(STEPS)):
            runner.run(play.step(number))
            found.append(play.state())
        runner.run(play.close())
    return found


@contextmanager
def traced(strike: Callable[[], None], by: str) -> Iterator[None]:
    """Call `strike` before every line or instruction of WATCHED, or of SQLite's machine, in any new thread."""
    if by == "sqlite":
        connect = journal_file.connect

        def watched(path: Path) -> sqlite3.Connection:
            db = connect(path)
            db.set_progress_handler(strike, 1)
            return db

        journal.connect = watched  # type: ignore[attr-defined]
        yield
        return

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in WATCHED:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = by == "opcode", by == "line"
        if event == by:
            strike()
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    yield
    sys.settrace(None)
    threading.settrace(None)


def played(template: Template, path: Path, by: str, at: int, pipe: int) -> int:
    """Play all steps and say on the pipe which are done; killed at the strike `at`, if there are so many.

    Returns:
        The strikes.
    """
    strikes = itertools.count(1)

    def strike() -> None:
        if next(strikes) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    with traced(strike, by), asyncio.Runner() as runner:
        play = Play(template, path)
        for number in range(len(STEPS)):
            runner.run(play.step(number))
            os.write(pipe, b".")
        runner.run(play.close())
    return next(strikes) - 1


def forgetful() -> None:
    """A fault to be found: a client has its answer before the journal has it."""

    async def write(self: Journal, write: journal.Write) -> None:
        self._submit(write)

    Journal._write = write  # type: ignore[method-assign]


def forked(work: Callable[[int], object]) -> tuple[int, bytes]:
    """(exit status, what it wrote on the pipe) of work done in a process of its own: it has threads, this one none."""
    its, mine = os.pipe()
    if pid := os.fork():
        os.close(mine)
        with os.fdopen(its, "rb") as pipe:
            said = pipe.read()
        return os.waitpid(pid, 0)[1], said
    try:
        os.close(its)
        work(mine)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def left(template: Template, path: Path, done: int, expected: list[State]) -> None:
    """Check a killed journal, go on with it, and check the end."""
    with asyncio.Runner() as runner:
        play = Play(template, path)
        found = play.state()
        reached = [number for number, state in enumerate(expected) if state == found]
        assert reached, f"{done} steps said to be done, found a state that never was"
        assert reached[0] in (done, done + 1), f"{done} steps said to be done, found the state after {reached[0]}"
        for number in range(reached[0], len(STEPS)):
            runner.run(play.step(number))
        assert play.state() == expected[-1], f"gone on from {reached}, the end is another"
        runner.run(play.close())


def main(argv: list[str]) -> int:
    """Kill as often as was asked; 1 if anything was lost, or no kill hit."""
    parser = argparse.ArgumentParser(prog="python -m tests.rollout.crash", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="directory with a tokenizer")
    parser.add_argument("--by", choices=["line", "opcode", "sqlite"], default="line")
    parser.add_argument("--kills", type=int, default=0, help="how many, spread evenly; 0: one at every step there is")
    parser.add_argument("--seed", type=int, default=0, help="where the first falls")
    parser.add_argument("--fault", action="store_true", help="answer before the journal has it: this must be found out")
    options = parser.parse_args(argv)
    if options.fault:
        forgetful()
    template = Template.load(str(options.model), append_roles=frozenset(ROLES))

    def journal_of(name: str) -> Path:
        path: Path = options.folder / name / "journal"
        path.parent.mkdir(parents=True)
        return path

    _, said = forked(partial(_tell_states, template, journal_of("expected")))
    expected: list[State] = pickle.loads(said)
    _, said = forked(partial(_tell_count, template, journal_of("counted"), options.by))
    total = int(said.split()[-1])
    hits = losses = 0
    for at in _places(total, options.kills, options.seed):
        path = journal_of(str(at))
        status, said = forked(partial(played, template, path, options.by, at))
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        hits += killed
        done = said.count(b".")
        if (status and not killed) or forked(partial(_tell_left, template, path, done, expected))[0]:
            print(f"{options.by} {at} of {total}: it ended after {done} of {len(STEPS)} steps; see {path}")
            losses += 1
    print(f"{hits} kills at {total} places by {options.by}; {losses} lost something")
    return int(bool(losses) or not hits)


def _places(total: int, kills: int, seed: int) -> list[int]:
    """Where the kills fall, 1..total."""
    stride = total / (kills or total)
    first = random.Random(seed).random() * stride
    return sorted({int(first + number * stride) + 1 for number in range(kills or total)})


def _tell_states(template: Template, path: Path, pipe: int) -> None:
    os.write(pipe, pickle.dumps(states(template, path)))


def _tell_count(template: Template, path: Path, by: str, pipe: int) -> None:
    os.write(pipe, b" %d" % played(template, path, by, 0, pipe))


def _tell_left(template: Template, path: Path, done: int, expected: list[State], pipe: int) -> None:
    left(template, path, done, expected)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
