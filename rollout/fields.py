"""Fields of a request in another dialect than OpenAI chat: their types, and the refusal of what cannot be kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pacenote.rollout.errors import BadRequest

Object = Mapping[str, Any]
ENGINE_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "min_tokens", "stop_token_ids", "ignore_eos", "seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "chat_template_kwargs",
)  # fmt: skip
"""Fields of chat that every dialect takes under the same name, whether or not its own API has them."""

_NAMES: dict[type, str] = {
    str: "a string", bool: "true or false", int: "a whole number", list: "a list", dict: "an object",
}  # fmt: skip
_T = TypeVar("_T")


def take(body: Object, name: str, kind: type[_T], where: str = "") -> _T | None:
    """A field of this type, or None where it is absent or null.

    Args:
        body: what has the field.
        name: the field's.
        kind: str, bool, int, list or dict.
        where: what comes before the name in errors, with its dot.

    Raises:
        BadRequest: another type; `param` is the path of the field.
    """
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong(where + name, _NAMES[kind], value)
    return value


def need(body: Object, name: str, kind: type[_T], where: str = "") -> _T:
    """`take` of a field that must be there.

    Raises:
        BadRequest: as `take`, or there is none.
    """
    value = take(body, name, kind, where)
    if value is None:
        raise wrong(where + name, _NAMES[kind], None)
    return value


def entries(value: list[Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """(path, object) of each entry of a list of objects.

    Raises:
        BadRequest: an entry that is no object.
    """
    for place, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise wrong(f"{where}[{place}]", _NAMES[dict], entry)
    return [(f"{where}[{place}]", entry) for place, entry in enumerate(value)]


def text(content: object, where: str, kinds: Collection[str]) -> str:
    """A content's text: a string, nothing, or text parts, joined as chat joins them.

    Args:
        content: parsed JSON.
        where: its path.
        kinds: the types that text parts have in this dialect.

    Raises:
        BadRequest: anything else, such as an image; its path is named.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(where, "a string or a list of text parts", content)
    parts = []
    for path, part in entries(content, where):
        if part.get("type") not in kinds:
            raise unserved(f"{path}.type", part.get("type"), "this server records text only")
        parts.append(need(part, "text", str, f"{path}."))
    return "".join(parts)


def forbid(body: Object, reasons: Mapping[str, str], where: str = "") -> None:
    """Refuse fields that are set to something: to neither null, false, nor an empty list or object.

    Args:
        body: what may have them.
        reasons: why each cannot be kept.
        where: what comes before the name in errors, with its dot.

    Raises:
        BadRequest: naming the field.
    """
    for name, reason in reasons.items():
        if body.get(name) not in (None, False, [], {}):
            raise BadRequest(f"{where}{name} cannot be used here: {reason}", param=where + name)


def wrong(where: str, expected: str, got: object) -> BadRequest:
    """The error for a field of another type or value."""
    shown = repr(got) if isinstance(got, str | int | float) else "nothing" if got is None else type(got).__name__
    return BadRequest(f"{where} must be {expected}, got {shown[:80]}", param=where)


def unserved(where: str, got: object, reason: str) -> BadRequest:
    """The error for something that the dialect has and this server does not."""
    return BadRequest(f"{where} {got!r} is not served: {reason}", param=where)
