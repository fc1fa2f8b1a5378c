"""Chat messages as clients send them, and when two of them are the same message.

Clients rewrite history on its way back: null fields vanish, strings become text parts, unknown fields appear, tool
arguments are printed anew. Two messages are the same if role, text and tool calls (name and parsed arguments) are, or
as `--match` has it (`rollout.matching`). What the session stored is what is rendered, so such rewriting never changes
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pacenote.rollout.errors import BadRequest

ROLES = ("system", "user", "assistant", "tool")
ROOT = bytes(16)
"""`chain` of no messages."""
DEEPEST = 100  # levels of a tool call's arguments; templates and encoders recurse, and give up at a few hundred


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Message:
    """One message of a conversation.

    Attributes:
        raw: as it came, without null fields; what is sent upstream and shown in records.
        plain: as chat templates want it: content is a string, tool arguments are objects.
        role: one of ROLES.
        reasoning: `reasoning_content`, None where absent or empty. Clients often drop it, so it is no part of `key`.
        key: 16 bytes; equal for messages that are the same. As parsed it is the strict one; see `rollout.matching`.
    """

    raw: Mapping[str, Any]
    plain: Mapping[str, Any]
    role: str
    reasoning: str | None
    key: bytes


def parse_messages(value: object) -> tuple[Message, ...]:
    """The messages of a request.

    Raises:
        BadRequest: not a non-empty list of messages; the index is named.
    """
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise BadRequest(f"messages must be a non-empty list of messages, got {got}", param="messages")
    return tuple(parse_message(entry, f"messages[{index}]") for index, entry in enumerate(value))


def parse_message(value: object, where: str) -> Message:
    """One message.

    Args:
        value: parsed JSON.
        where: how to call it in errors.

    Raises:
        BadRequest: not an object, a role outside ROLES, content that is not text, malformed tool calls.
    """
    if not isinstance(value, Mapping):
        raise BadRequest(f"{where} must be an object, got {type(value).__name__}", param="messages")
    raw = {name: field for name, field in value.items() if field is not None}
    role = raw.get("role")
    if role not in ROLES:
        raise BadRequest(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", param="messages")
    text = _text(raw.get("content"), where)
    reasoning = raw.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise BadRequest(f"{where}.reasoning_content must be a string", param="messages")
    plain: dict[str, Any] = {"role": role, "content": text}
    plain |= {name: raw[name] for name in ("name", "tool_call_id") if isinstance(raw.get(name), str)}
    calls = _calls(raw.get("tool_calls"), where) if role == "assistant" else []
    if role == "assistant" and reasoning:
        plain["reasoning_content"] = reasoning
    if calls:
        plain["tool_calls"] = calls
    identity = [role, text, [(call["function"]["name"], call["function"]["arguments"]) for call in calls]]
    try:
        key = _digest(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode())
    except RecursionError as error:
        raise BadRequest(f"{where}.tool_calls are nested too deeply", param="messages") from error
    return Message(raw=raw, plain=plain, role=role, reasoning=reasoning or None, key=key)


def chain(keys: Sequence[bytes], start: bytes = ROOT) -> list[bytes]:
    """Digests of all prefixes of a history: entry n stands for the first n messages after `start`; entry 0 is `start`.

    Args:
        keys: `Message.key` of each message.
        start: digest of the history before them.
    """
    links = [start]
    for key in keys:
        links.append(_digest(links[-1] + key))
    return links


def _text(content: object, where: str) -> str:
    """Text of a `content`: a string, nothing, or a list of text parts, which are joined as templates join them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(
            f"{where}.content must be a string or a list of text parts, got {type(content).__name__}", param="messages"
        )
    parts = []
    for place, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise BadRequest(
                f"{where}.content[{place}] must be a text part, got type {kind!r}: this server records text only",
                param="messages",
            )
        parts.append(text)
    return "".join(parts)


def _calls(value: object, where: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRequest(f"{where}.tool_calls must be a list, got {type(value).__name__}", param="messages")
    return [_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(value)]


def _call(value: object, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(function, Mapping):
        raise BadRequest(f"{where} must be an object with a function", param="messages")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise BadRequest(f"{where}.function.name must be a string, got {name!r}", param="messages")
    if arguments is not None and not isinstance(arguments, str | Mapping):
        raise BadRequest(f"{where}.function.arguments must be a JSON text, got {arguments!r}", param="messages")
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": _arguments(arguments)}}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def _arguments(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments as an object.

    A policy writes arguments that are no JSON object, and the agent sends them back. That must not end the session:
    such a text is rendered as one argument named `arguments`. The policy's own tokens are what it sampled either way.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    try:
        parsed = json.loads(value)
        json.dumps(parsed, ensure_ascii=False).encode()  # an escaped lone surrogate is no text that can be tokenised
    except (ValueError, RecursionError):
        return {"arguments": value}
    return parsed if isinstance(parsed, dict) and not _deeper(parsed, DEEPEST) else {"arguments": value}


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(item, levels - 1) for item in inner)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
