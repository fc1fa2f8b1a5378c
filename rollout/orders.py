"""Conversations of every order of roles, to try a chat template on.

An order is the kind of the answer that a session goes on from and the roles that are appended to it. `orders` lists the
short ones; `conversations` samples longer ones, of several turns, from a seed. Every text starts with a word of its
own.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pacenote.rollout.messages import ROLES, Message, parse_message

KINDS = ("plain", "thinking", "empty", "thinking only", "call", "call after thinking", "two calls")
WITHOUT_THINKING = tuple(kind for kind in KINDS if "think" not in kind)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look something up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "what"}}},
        },
    },
)
TEXTS = ("", " and more", "\n\nsecond line\n", " naïve Zürich 漢字 🙂 \u200d", ' {"quoted": [1, null]}', " long" * 120)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is appended, and the answer to it.

    Attributes:
        appended: the messages, none for an answer after an answer.
        answer: the assistant's.
        kind: of the answer, one of KINDS.
        words: one for each appended message, which stands in its text.
    """

    appended: tuple[Message, ...]
    answer: Message
    kind: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Steps of one session, and whether tools are declared."""

    steps: tuple[Step, ...]
    tools: bool


def well_formed(kind: str, roles: Sequence[str]) -> bool:
    """Whether tools' messages answer calls: none without one, and one for each call where they come."""
    calls = {"call": 1, "call after thinking": 1, "two calls": 2}.get(kind, 0)
    tools = sum(role == "tool" for role in roles)
    return tools == 0 or (tools == calls and all(role == "tool" for role in roles[:tools]))


def step(draw: random.Random, roles: Sequence[str], kind: str) -> Step:
    """Messages of these roles, with a word and a text each, and an answer of this kind."""
    words = [f"w{draw.randrange(10**9):09d}" for _ in roles]
    appended = []
    for place, (role, word) in enumerate(zip(roles, words, strict=True)):
        extra = {"tool_call_id": f"call0000{place}", "name": "look"} if role == "tool" else {}
        appended.append(parse_message({"role": role, "content": word + draw.choice(TEXTS)} | extra, "example"))
    return Step(appended=tuple(appended), answer=_answer(draw, kind), kind=kind, words=tuple(words))


def orders(seed: int, kinds: Sequence[str] = KINDS) -> Iterator[Conversation]:
    """Each kind of answer followed by each order of up to two roles."""
    draw = random.Random(seed)
    for kind in kinds:
        for roles in itertools.chain.from_iterable(itertools.product(ROLES, repeat=length) for length in range(3)):
            yield Conversation(steps=(step(draw, ["user"], kind), step(draw, roles, "plain")), tools=False)


def conversations(seed: int, count: int, kinds: Sequence[str] = KINDS) -> Iterator[Conversation]:
    """Random conversations of up to five turns, mostly well formed."""
    draw = random.Random(seed)
    for _ in range(count):
        steps = [step(draw, draw.choice((("user",), ("system", "user"), ("user", "user"))), draw.choice(kinds))]
        while len(steps) < 5 and draw.random() < 0.8:
            steps.append(step(draw, _roles(draw, steps[-1].kind), draw.choice(kinds)))
        yield Conversation(steps=tuple(steps), tools=draw.random() < 0.5)


def _roles(draw: random.Random, kind: str) -> tuple[str, ...]:
    calls = {"call": 1, "call after thinking": 1, "two calls": 2}.get(kind, 0)
    others = draw.choices(("user", "assistant", "system"), weights=(6, 2, 1), k=draw.choice((0, 1, 1, 2)))
    return ("tool",) * calls + tuple(others) if draw.random() < 0.9 else tuple(draw.choices(ROLES, k=3))


def _answer(draw: random.Random, kind: str) -> Message:
    word = f"a{draw.randrange(10**9):09d}"
    message: dict[str, Any] = {"role": "assistant", "content": word + draw.choice(TEXTS)}
    if kind in ("empty", "thinking only", "call after thinking"):
        message["content"] = ""
    if kind in ("thinking", "thinking only", "call after thinking"):
        message["reasoning_content"] = f"t{word}{draw.choice(TEXTS)}".strip()
    calls = {"call": 1, "call after thinking": 1, "two calls": 2}.get(kind, 0)
    if calls:
        arguments = json.dumps({"word": word + draw.choice(TEXTS)})
        function = {"name": "look", "arguments": arguments}
        message["tool_calls"] = [{"id": f"call0000{n}", "type": "function", "function": function} for n in range(calls)]
    return parse_message(message, "example")
