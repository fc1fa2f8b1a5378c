"""`pacenote serve`: the session server's command line."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pacenote.rollout.auth import read_tokens
from pacenote.rollout.errors import UpstreamError
from pacenote.rollout.launch import exit_with_parent
from pacenote.rollout.linear import POLICIES
from pacenote.rollout.matching import MODES
from pacenote.rollout.messages import ROLES
from pacenote.rollout.pairs import AUTO, Pair
from pacenote.rollout.quota import Quota
from pacenote.rollout.request_limits import USUAL, RequestLimits
from pacenote.rollout.request_log import FORMATS
from pacenote.rollout.server import SessionConfig, load_front, serve
from pacenote.rollout.store import open_store
from pacenote.rollout.template import FAMILIES
from pacenote.rollout.tito import FLAG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pacenote serve",
        description="The session server: OpenAI chat in; exact tokens, logprobs and routed experts kept for training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="directory with tokenizer and config.json")
    add(
        "--upstream",
        help="base URL of an SGLang-compatible engine or gateway; the first pair's decode engine if left out",
    )
    add("--family", default="auto", choices=["auto", *FAMILIES], help="chat template family")
    add("--template", dest="chat_template", type=Path, metavar="FILE", help="a chat template instead of the model's")
    add("--trust-remote-code", action="store_true", help="run the tokenizer code that some models bring")
    add("--served-model", help="the model's name upstream; the value of --model if left out")
    add("--pair", dest="pairs", action="append", default=[], metavar="PREFILL_URL,BOOTSTRAP_PORT,DECODE_URL",
        help="drive this prefill/decode pair; may be given again; auto: the pairs that the gateway lists")  # fmt: skip
    add("--probe", action=argparse.BooleanOptionalAction, default=True,
        help="answer no chat before the way to the engine was seen to lose nothing")  # fmt: skip
    add("--check-upstream", action="store_true", help="try the way to the engine, say what is lost, and end")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8100, help="port to listen on; 0 picks a free one")
    add(FLAG, dest="append_roles", nargs="+", default=["tool"], choices=ROLES, metavar="ROLE",
        help=f"roles that agents may append after a generated answer, of {', '.join(ROLES)}")  # fmt: skip
    add("--routing-replay", action=argparse.BooleanOptionalAction, default=True, help="keep routed experts")
    add("--timeout", type=float, default=600.0, help="seconds that one answer of the engine may take")
    add("--policy", default="tree", choices=POLICIES,
        help="tree: what does not extend the history branches off; linear: refused, but for one step back")  # fmt: skip
    add("--match", default="strict", metavar="MODE",
        help=f"when two messages are the same: {', '.join(MODES)} or package.module:function")  # fmt: skip
    add("--store", default="memory", help="where sessions live: memory, or sqlite:PATH to outlive the process")
    add("--auth", default="off", choices=["off", "tokens"],
        help="who may ask: anybody (loopback hosts only), or holders of tokens")  # fmt: skip
    add("--auth-file", type=Path, metavar="PATH",
        help="admin tokens, one a line; the variable PACENOTE_AUTH_TOKENS if left out")  # fmt: skip
    add("--session-ttl", type=float, metavar="SECONDS", help="forget sessions that nobody used for so long")
    add("--max-body", type=int, default=64 << 20, metavar="BYTES", help="largest body of a request")
    add("--max-depth", type=int, default=USUAL.depth, metavar="N", help="levels of lists and objects in a body's JSON")
    add("--max-messages", type=int, default=USUAL.messages, metavar="N", help="messages of a chat")
    add("--max-prompt-tokens", type=int, metavar="N", help="tokens of a chat's prompt; the engine decides if left out")
    add("--max-new-tokens", type=int, metavar="N",
        help="tokens that an agent may ask for, and that are asked for where it does not say")  # fmt: skip
    add("--max-sessions", type=int, metavar="N", help="sessions that may be held; new ones are refused then")
    add("--max-total-bytes", type=int, metavar="BYTES", help="bytes of turns that may be held; chats are refused then")
    add("--max-session-bytes", type=int, metavar="BYTES", help="the same of one session")
    add("--log", default="text", choices=FORMATS, help="lines on stderr for each request and answered chat")
    add("--log-content", action="store_true", help="show in these lines what was said, too")
    add("--drain", type=float, default=30.0, metavar="SECONDS",
        help="after SIGTERM, seconds that answers in flight have to end in")  # fmt: skip
    add("--workers", type=int, default=1, metavar="N", help="processes behind the port; each holds its sessions")
    return parser


def serve_command(argv: Sequence[str]) -> int:
    """`pacenote serve`. Returns the exit code: 0 after a signal, 2 for what the user can put right."""
    try:
        options = vars(_parser().parse_args(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    exit_with_parent()
    roles, file = frozenset(options.pop("append_roles")), options.pop("auth_file")
    check, options["pairs"] = options.pop("check_upstream"), tuple(options["pairs"])
    held = {name: options.pop(f"max_{name}") for name in ("sessions", "total_bytes", "session_bytes")}
    asked = {name: options.pop(f"max_{name}") for name in ("depth", "messages", "prompt_tokens", "new_tokens")}
    try:
        options |= {"quota": Quota(**held), "limits": RequestLimits(**asked)}
        options["upstream"] = options["upstream"] or _decode_side(options["pairs"])
        if options["auth"] == "tokens":
            options["tokens"] = read_tokens(file, os.environ)
        elif file is not None:
            raise ValueError("expected --auth tokens with --auth-file")
        config = SessionConfig(append_roles=roles, **options)
        if check:
            return _check(config)
        serve(config)
    except OSError as error:
        address = f"{options['host']}:{options['port']}"
        return _fail(f"cannot listen on {address}: {error.strerror or error}; choose another --port")
    except (ValueError, OverflowError) as error:
        return _fail(str(error))
    return 0


def _decode_side(pairs: tuple[str, ...]) -> str:
    """Where other paths are passed on to if nothing else is said."""
    if not pairs or pairs == (AUTO,):
        raise ValueError("expected --upstream with the URL of an engine or gateway, got none")
    return Pair.read(pairs[0]).decode


def _check(config: SessionConfig) -> int:
    """Say what is lost on the way to the engine; 1 if something is, or nobody answers."""
    front = load_front(config, store=open_store("memory"))
    try:
        lost = asyncio.run(front.try_upstream())
    except UpstreamError as error:
        lost = [str(error)]
    where = " ".join(config.pairs) or config.upstream
    print("\n".join(f"lost: {text}" for text in lost) if lost else f"nothing is lost between here and {where}")
    return int(bool(lost))


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2
