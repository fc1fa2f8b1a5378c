"""Several server processes behind one port: start them, watch them, start one again that dies, stop them.

Each process holds its share of the sessions and listens on a Unix socket of its own; `gate` stands in front.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import uvloop

from pacenote.rollout.errors import StartupError
from pacenote.rollout.gate import Gate
from pacenote.rollout.launch import PARENT_VARIABLE, exit_with_parent
from pacenote.rollout.share import Share

GRACE = 5.0  # seconds between the end of the drain and SIGKILL
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before a process is started again that has died before
Work = Callable[[Share, socket.socket, Callable[[], None]], None]
"""(share, socket to listen on, to be called once it listens) of one process; picklable."""

_SPAWN = multiprocessing.get_context("spawn")
log = logging.getLogger(__name__)


class Worker:
    """One process.

    Args:
        work: what it runs.
        share: its part of the sessions.
        path: its socket.
    """

    def __init__(self, work: Work, share: Share, path: Path) -> None:
        self._work = work
        self._share = share
        self.path = path
        self._process: SpawnProcess | None = None
        self._stopping = False

    def start(self) -> None:
        """Start it, and wait until it can be connected to.

        Raises:
            StartupError: it says so, or ends.
        """
        if self._stopping:
            raise StartupError("the server is ending")
        mine, its = _SPAWN.Pipe()
        process = _SPAWN.Process(
            target=_main, args=(self._work, self._share, self.path, its), name=f"sessions-{self._share.index}"
        )
        process.start()
        self._process = process
        its.close()
        with contextlib.closing(mine):
            try:
                problem = mine.recv()
            except EOFError:
                process.join()
                problem = f"it ended with exit code {process.exitcode}"
        if problem is not None:
            process.join()
            raise StartupError(str(problem))

    async def watch(self) -> None:
        """Start the process again whenever it ends, until `stop`."""
        pause = 0.0
        while True:
            assert self._process is not None
            await asyncio.to_thread(self._process.join)
            if self._stopping:
                return
            log.error("session process %d ended with exit code %s", self._share.index, self._process.exitcode)
            await asyncio.sleep(pause)
            try:
                await asyncio.to_thread(self.start)
                pause = SHORTEST_PAUSE
            except StartupError as error:
                log.error("session process %d cannot start: %s", self._share.index, error)
                pause = min(2 * pause + SHORTEST_PAUSE, LONGEST_PAUSE)

    def stop(self) -> None:
        """Ask it to end, for good."""
        self._stopping = True
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End it the hard way, if it is still there, and wait for that."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def run(work: Work, listener: socket.socket, *, count: int, ready: Callable[[], None], drain: float = 0.0) -> None:
    """Answer on a socket with `count` processes, until SIGTERM or SIGINT.

    Args:
        work: what each process runs.
        listener: bound; it listens once all processes do.
        ready: called then.
        drain: seconds that the processes give what is in flight at the end.

    Raises:
        StartupError: a process cannot start.
    """
    with tempfile.TemporaryDirectory(prefix="pacenote-") as folder:
        workers = [Worker(work, Share(index=index, count=count), Path(folder) / str(index)) for index in range(count)]
        try:
            for worker in workers:
                worker.start()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(workers, listener, ready, drain))
        finally:
            for worker in workers:
                worker.kill()


async def _serve(workers: list[Worker], listener: socket.socket, ready: Callable[[], None], drain: float) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    gate = await Gate([worker.path for worker in workers]).serve(listener)
    watches = [asyncio.create_task(worker.watch()) for worker in workers]
    ready()
    await ended.wait()
    gate.close()
    for worker in workers:
        worker.stop()
    await asyncio.wait(watches, timeout=drain + GRACE)  # what is in flight ends through the gate
    for worker in workers:
        worker.kill()  # or a thread would wait for it, and the loop for that thread
    for task in watches:
        task.cancel()


def _main(work: Work, share: Share, path: Path, pipe: Connection) -> None:
    """A process's entry point. Sends None once it listens, or what is wrong."""
    os.setsid()  # Ctrl-C in the terminal reaches the parent, which stops its processes
    parent = multiprocessing.parent_process()
    assert parent is not None
    os.environ[PARENT_VARIABLE] = str(parent.pid)
    exit_with_parent()
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            work(share, listener, lambda: pipe.send(None))
    except StartupError as error:
        with contextlib.suppress(OSError):
            pipe.send(str(error))
        raise SystemExit(2) from error
