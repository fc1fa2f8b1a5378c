"""Changes in JSON that leave it JSON, for a fuzzer whose own changes would mostly break it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

Bytes = Callable[[bytes], bytes]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, float("inf"), float("nan"), "", "a", "text", "\0",
    "\ud800", "<think>", "</think>", "<tool_call>", [], {}, [[]], {"": None}, {"type": "text"}, [None], "assistant",
]  # fmt: skip
DEEP = 300


def mutate_json(raw: bytes, rng: random.Random, mutate: Bytes) -> bytes | None:
    """The JSON with one to three of its parts taken out, replaced, doubled or moved; None if it is no JSON,
    or has become too deep to be written.

    Args:
        raw: JSON.
        rng: chooses.
        mutate: changes a text's bytes.
    """
    try:
        root = [json.loads(raw)]
        for _ in range(rng.randint(1, 3)):
            places = _places(root)
            holder, name = rng.choice(places)
            _change(holder, name, places, rng, mutate)
            if not root:
                return b"null"
        return json.dumps(root[0], ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return None


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(holder, index or name) of everything inside."""
    found, todo = [], [root]
    while todo:
        holder = todo.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for name, value in items:
            found.append((holder, name))
            if isinstance(value, dict | list):
                todo.append(value)
    return found


def _change(holder: Any, name: Any, places: list[tuple[Any, Any]], rng: random.Random, mutate: Bytes) -> None:
    value, kind = holder[name], rng.randrange(7)
    if kind == 0:
        del holder[name]
    elif kind == 1:
        other, at = rng.choice(places)
        holder[name] = deepcopy(other[at])
    elif kind == 2 and isinstance(holder, list):
        holder.insert(rng.randint(0, len(holder)), deepcopy(value))
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(places)[1] if rng.random() < 0.5 else "x"] = holder.pop(name)
    elif kind == 4 and isinstance(value, str):
        holder[name] = mutate(value.encode(errors="surrogatepass")).decode(errors="replace")
    elif kind == 5 and rng.random() < 0.1:
        for _ in range(rng.randrange(DEEP)):
            value = [value] if rng.random() < 0.5 else {"a": value}
        holder[name] = value
    else:
        holder[name] = deepcopy(rng.choice(VALUES))
