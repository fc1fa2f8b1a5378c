"""`pacenote workers`: a router's workers from the command line. See docs/operations.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pacenote.rollout.lifecycle import PoolConfig
from pacenote.rollout.pool import WorkerPool
from pacenote.rollout.registration import AUTO, Router, RouterConfig
from pacenote.rollout.router_dialects import DIALECTS, Listed
from pacenote.rollout.worker import ROLES, State, Worker, worker_url
from pacenote.rollout.worker_errors import EngineError, WorkerError
from pacenote.rollout.worker_probe import Probe

KEY_VARIABLE = "PACENOTE_ROUTER_API_KEY"
Place = tuple[str, str, int | None]
"""URL, role, bootstrap port."""


def workers_command(words: Sequence[str]) -> int:
    """Run `pacenote workers ...`; returns the exit status: 0 done, 1 a worker or the router is at fault, 2 usage."""
    try:
        asked = _parser().parse_args(words)
    except SystemExit as end:
        return int(end.code or 0)
    logging.basicConfig(format="pacenote: %(message)s", level=logging.WARNING, stream=sys.stderr)
    commands: dict[str, Callable[[argparse.Namespace, RouterConfig], int]] = {
        "add": _add,
        "list": _list,
        "remove": _remove,
        "watch": _watch,
    }
    try:
        config = RouterConfig(
            url=asked.router,
            dialect=asked.dialect,
            api_key=os.environ.get(KEY_VARIABLE) or None,
            accept_unlisted_role=asked.accept_unlisted_role,
            timeout=asked.timeout,
            confirm=asked.confirm,
        )
        return commands[asked.command](asked, config)
    except ValueError as error:
        return _fail(error, 2)
    except WorkerError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)


def _add(asked: argparse.Namespace, config: RouterConfig) -> int:
    wanted = asked.weight_version
    place: Place = (worker_url(asked.url), asked.role, asked.bootstrap_port)
    Worker(url=place[0], role=place[1], bootstrap_port=place[2], wanted="")  # refuses what does not fit before any call
    version = Probe().version(place[0]) if wanted is None else wanted
    pool = WorkerPool(config, weight_version=version, leave=False)
    worker = pool.add(*place)
    note = f"weights {version} verified" if wanted is not None else f"it serves weights {version}; none were asked for"
    _say(asked, worker.plain(), f"{worker.url} is registered at {config.url} as a {worker.role} worker; {note}")
    return 0


def _list(asked: argparse.Namespace, config: RouterConfig) -> int:
    router = Router(config)
    listed = router.listing()
    if asked.json:
        entries = [
            {
                "url": w.url,
                "id": w.id,
                "role": w.role,
                "healthy": w.healthy,
                "bootstrap_port": w.bootstrap_port,
                "draining": w.draining,
            }
            for w in listed
        ]
        print(json.dumps({"router": router.url, "dialect": router.dialect.name, "workers": entries}))
        return 0
    for worker in sorted(listed, key=lambda w: (w.role or "", w.url)):
        print(_line(worker))
    print(f"{len(listed)} workers at {router.url} (dialect {router.dialect.name}){_half(listed)}")
    return 0


def _remove(asked: argparse.Namespace, config: RouterConfig) -> int:
    if not Router(config).remove(asked.url):
        return _fail(f"the router {config.url} does not list {worker_url(asked.url)}: see pacenote workers list", 1)
    _say(asked, {"url": worker_url(asked.url), "removed": True}, f"{asked.url} is no longer at {config.url}")
    return 0


def _watch(asked: argparse.Namespace, config: RouterConfig) -> int:
    places = _places(asked, config)
    if not places:
        raise ValueError("expected workers to watch: name them, give --file, or register some at the router first")
    version = _served(places) if asked.weight_version is None else asked.weight_version
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    pool = WorkerPool(
        config,
        weight_version=version,
        config=PoolConfig(health_every=asked.every),
        listener=lambda worker: _say(asked, worker.plain(), _change(worker)),
        leave=False,
    )
    for place in places:
        pool.add(*place, keep=True)
    if not asked.once:
        pool.watch()
        stop.wait()
        pool.close()
    sick = [worker.url for worker in pool.workers() if worker.state is not State.CURRENT]
    if pool.missing is not None or sick:
        return _fail(pool.missing or f"not current: {', '.join(sick)}", 1)
    return 0


def _served(places: Sequence[Place]) -> str:
    """The weight version that those which answer serve."""
    versions = {}
    for url, _, _ in places:
        with contextlib.suppress(EngineError):
            versions[url] = Probe().version(url)
    if len(set(versions.values())) != 1:
        found = ", ".join(f"{url}: {version}" for url, version in versions.items()) or "no answer from any"
        raise ValueError(f"expected workers that serve the same weights, got {found}: give --weight-version")
    return next(iter(versions.values()))


def _places(asked: argparse.Namespace, config: RouterConfig) -> list[Place]:
    """Named ones, those of the file, or else what the router lists."""
    words = list(asked.workers)
    if asked.file is not None:
        try:
            lines = asked.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"expected --file {asked.file} as a file of workers: {error}") from error
        words += [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    if words:
        return [_place(word) for word in words]
    return [(w.url, w.role or "regular", w.bootstrap_port) for w in Router(config).listing() if not w.draining]


def _place(word: str) -> Place:
    url, *rest = word.split(",")
    if len(rest) > 2 or (len(rest) == 2 and not rest[1].isdigit()):
        raise ValueError(f"expected a worker as URL[,ROLE[,BOOTSTRAP_PORT]], got {word!r}")
    return worker_url(url), rest[0] if rest else "regular", int(rest[1]) if len(rest) == 2 else None


def _line(worker: Listed) -> str:
    health = {True: "healthy", False: "UNHEALTHY", None: "health unknown"}[worker.healthy]
    health = "draining" if worker.draining else health
    port = "" if worker.bootstrap_port is None else f" bootstrap port {worker.bootstrap_port}"
    return f"{worker.role or 'role unknown':<12} {worker.url}  {health}{port}"


def _half(listed: Sequence[Listed]) -> str:
    roles = {worker.role for worker in listed}
    if ("prefill" in roles) == ("decode" in roles):
        return ""
    return "; INCOMPLETE: " + ("prefill without decode" if "prefill" in roles else "decode without prefill")


def _change(worker: Worker) -> str:
    return f"{worker.url} {worker.role}: {worker.state}" + (f" ({worker.reason})" if worker.reason else "")


def _say(asked: argparse.Namespace, plain: dict[str, Any], text: str) -> None:
    print(json.dumps(plain) if asked.json else text, flush=True)


def _fail(error: object, status: int) -> int:
    print(f"pacenote: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--router", required=True, metavar="URL", help="the router or gateway")
    add("--dialect", choices=(AUTO, *DIALECTS), default=AUTO, help="how it is told about workers; auto asks it")
    add("--accept-unlisted-role", action="store_true",
        help="take a prefill or decode worker as registered though the router's listing has no roles")  # fmt: skip
    add("--timeout", type=float, default=5.0, metavar="SECONDS", help="of one call to the router; default 5")
    add("--confirm", type=float, default=30.0, metavar="SECONDS", help="until its listing must agree; default 30")
    add("--json", action="store_true", help="print JSON")
    parser = argparse.ArgumentParser(
        prog="pacenote workers", description="Add, list, remove and watch a router's workers.",
        epilog=f"exit status: 0 done, 1 a worker or the router is at fault, 2 bad usage. {KEY_VARIABLE} is sent to the "
        "router as a bearer token.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    adds = commands.add_parser("add", parents=[common], help="verify a running engine, register it, confirm that")
    adds.add_argument("url", metavar="URL", help="the engine")
    adds.add_argument("--role", choices=ROLES, default="regular")
    adds.add_argument(
        "--bootstrap-port", type=int, metavar="PORT", help="of a prefill engine; SGLang's default is 8998"
    )
    adds.add_argument("--weight-version", metavar="V", help="refuse an engine that serves another one")
    commands.add_parser("list", parents=[common], help="what the router lists")
    removes = commands.add_parser("remove", parents=[common], help="take a worker off the router, and confirm that")
    removes.add_argument("url", metavar="URL", help="the engine, as it was added")
    watch = commands.add_parser(
        "watch", parents=[common],
        help="check workers until Ctrl-C: sick ones leave the router, and return when they are well",
    )  # fmt: skip
    watch.add_argument("workers", nargs="*", metavar="URL[,ROLE[,PORT]]", help="those that the router lists if none")
    watch.add_argument("--file", type=Path, metavar="FILE", help="more of them, one a line; # starts a comment")
    watch.add_argument("--weight-version", metavar="V", help="that they should serve; what they serve now if not given")
    watch.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two checks; default 5")
    watch.add_argument("--once", action="store_true", help="check once; exit status 1 if one is not current")
    return parser
