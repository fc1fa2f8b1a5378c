"""When two messages are the same message: `--match`.

A request goes on from an answer whose history it starts with; what counts as "the same" is one of these:

strict            role, text and tool calls (names, parsed arguments); reasoning, where the request brings it back
loose-tool-call   role, text and the names of tool calls; reasoning as above
role-content      role and text
PACKAGE.MODULE:FUNCTION   whatever JSON value FUNCTION returns for a message

Whichever it is, the session renders the message that it has stored, so a loose mode never changes tokens.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from pacenote.rollout.errors import MatchFailed, StartupError
from pacenote.rollout.messages import Message, parse_message

KeyFunction = Callable[[dict[str, Any]], object]
MODES = ("strict", "loose-tool-call", "role-content")
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
_PROBES = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "u"}]},
    {"role": "assistant", "content": "a", "reasoning_content": "r"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "content": "t", "tool_call_id": "c", "name": "f"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A way to tell whether two messages are the same.

    Attributes:
        name: as in `--match`.
        function: gives a message's JSON value; None leaves the keys as they were parsed.
        reasoning: reasoning that a request brings back must be the stored one.
    """

    name: str = "strict"
    function: KeyFunction | None = None
    reasoning: bool = True

    @classmethod
    def load(cls, name: str) -> Match:
        """The mode of this name, or a user's function, which is tried on a message of each role.

        Raises:
            StartupError: no such mode, module or function, or one that raises, returns no JSON value or another one
                the second time.
        """
        check_name(name)
        if name == "strict":
            return cls()
        if name == "loose-tool-call":
            return cls(name=name, function=_calls_by_name)
        if name == "role-content":
            return cls(name=name, function=_role_and_text, reasoning=False)
        match = cls(name=name, function=_import(name), reasoning=False)
        probes = [parse_message(probe, "a probe") for probe in _PROBES]
        try:
            settled = [one.key for one in match.keyed(probes)] == [one.key for one in match.keyed(probes)]
        except MatchFailed as error:
            raise StartupError(f"expected a key function that works for every role: {error}") from error
        if not settled:
            raise StartupError(f"expected {name} to return the same for the same message, got another value")
        return match

    def keyed(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages with this mode's keys.

        Args:
            messages: as parsed.

        Raises:
            MatchFailed: the user's function raised or returned no JSON value; names it and the message's index.
        """
        if self.function is None:
            return tuple(messages)
        return tuple(
            replace(message, key=self._key(self.function, message, index)) for index, message in enumerate(messages)
        )

    def _key(self, function: KeyFunction, message: Message, index: int) -> bytes:
        try:
            value = function(copy.deepcopy(dict(message.plain)))
            text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        except Exception as error:  # a function that others wrote may raise anything
            what = f"{type(error).__name__}: {error}"
            raise MatchFailed(
                f"--match {self.name} failed on messages[{index}] of role {message.role!r}: {what}", param="messages"
            ) from error
        return blake2b(text.encode(), digest_size=16).digest()


STRICT = Match()


def check_name(name: str) -> None:
    """Check that `--match` names a mode or looks like an import path; imports nothing.

    Raises:
        StartupError: it does neither.
    """
    if name not in MODES and not _PATH.fullmatch(name):
        raise StartupError(f"expected match as {', '.join(MODES)} or package.module:function, got {name!r}")


def _import(path: str) -> KeyFunction:
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs code that others wrote
        raise StartupError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise StartupError(f"expected {path} to be a function, got {type(found).__name__}")
    function: KeyFunction = found
    return function


def _calls_by_name(message: dict[str, Any]) -> object:
    return [message["role"], message["content"], [call["function"]["name"] for call in message.get("tool_calls", ())]]


def _role_and_text(message: dict[str, Any]) -> object:
    return [message["role"], message["content"]]
