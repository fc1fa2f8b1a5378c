"""One command of a longer run: its limit, what it prints, how it ended. Standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Judge = Callable[[int, Sequence[str]], str]
"""From exit status and lines of output to what is wrong; empty if nothing is."""


def exit_status(status: int, lines: Sequence[str]) -> str:
    """A command failed if it says so."""
    return f"exit status {status}" if status else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage.
        command: for a number of seconds that it may take.
        most: seconds it gets at most.
        least: seconds that the stages before it leave to it.
        grace: of its seconds, those that a command which watches its own time gets to end.
        judge: what is wrong with its outcome.
        may_stop: running out of time is no failure: what it wrote until then is whole.
        environment: what it needs besides.
    """

    name: str
    command: Callable[[float], list[str]]
    most: float
    least: float
    grace: float = 12.0
    judge: Judge = exit_status
    may_stop: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a stage ended: held, failed, stopped (out of time) or absent; why, or what it said last; its last lines."""

    name: str
    status: str
    why: str
    seconds: float = 0.0
    command: str = ""
    tail: tuple[str, ...] = ()
    fatal: bool = False


def environment() -> dict[str, str]:
    """This process's environment with the sources on the path and the interpreter of Triton off."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(ROOT / "src"), str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def python(*words: str) -> list[str]:
    """A command of this python."""
    return [sys.executable, *words]


def say(text: str) -> None:
    """Print at once: the output of commands comes between."""
    print(f"gpu: {text}", flush=True)


def run(stage: Stage, seconds: float) -> Outcome:
    """Run a stage's command, show what it prints, and end it and its children after so long."""
    command = stage.command(max(1.0, seconds - stage.grace))
    say(f"{stage.name}: at most {seconds:.0f} s: {' '.join(command)}")
    start, lines = time.monotonic(), deque[str](maxlen=5000)
    try:
        status = _finish(command, environment() | stage.environment, seconds, lines)
        why = "out of time" if status is None else stage.judge(status, tuple(lines))
        end = "held" if not why else "stopped" if status is None else "failed"
    except OSError as error:
        why, end = str(error), "failed"
    took = time.monotonic() - start
    say(f"{stage.name}: {end}{f' ({why})' if why else ''} in {took:.0f} s")
    spoken = [line for line in lines if line.strip("= ") and not line.startswith("=========")]
    return Outcome(
        name=stage.name,
        status=end,
        why=why or (spoken[-1].strip("= ") if spoken else ""),
        seconds=round(took, 1),
        command=" ".join(command),
        tail=tuple(lines)[-30:],
        fatal=end == "failed" or (end == "stopped" and not stage.may_stop),
    )


def _finish(command: list[str], env: dict[str, str], seconds: float, lines: deque[str]) -> int | None:
    """The exit status; None if it was ended with all its children, being out of time."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, to be ended as one
    )
    reader = threading.Thread(target=_show, args=(process, lines), daemon=True)
    reader.start()
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(timeout=5)


def _show(process: subprocess.Popen[str], lines: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        print(line, end="", flush=True)


def follow(plan: Sequence[Stage | Outcome], seconds: float, report: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """Run stages one after another, each within its own limit and what the ones behind it need."""
    end, outcomes = time.monotonic() + seconds, list[Outcome]()
    for number, stage in enumerate(plan):
        if isinstance(stage, Outcome):
            say(f"{stage.name}: absent: {stage.why}")
            outcomes.append(stage)
        else:
            behind = sum(later.least for later in plan[number + 1 :] if isinstance(later, Stage))
            left = end - time.monotonic()
            outcomes.append(run(stage, max(min(stage.most, left - behind), min(stage.least, left), 1.0)))
        report(outcomes)
    return outcomes
