"""The linear policy: one line of turns, from which at most the newest answer may be taken back.

Under the default policy every request that does not go on is a branch. Where an agent promises to be append-only, the
linear policy holds it to that: a request extends the newest answer, or the one before it, and takes the newest back.
Everything else is refused with the first difference, and the session stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pacenote.rollout.errors import NotLinear
from pacenote.rollout.messages import Message
from pacenote.rollout.session import Session
from pacenote.rollout.turn import Prompt, Turn

POLICIES = ("tree", "linear")
_SHOWN = 60  # characters of each text
_ADVICE = (
    "--policy linear goes on from the newest answer, or takes that one back: send the history as it was answered, "
    "start another session for another conversation, or serve with --policy tree"
)


def checkpoint(session: Session, messages: Sequence[Message], *, reasoning: bool) -> Turn | None:
    """The newest answer or the one before it, whichever the request extends; None for the start of the session.

    Args:
        session: the session; not changed.
        messages: the request's.
        reasoning: as `Session.find`.

    Raises:
        NotLinear: it extends neither; names the first message that differs and shows both texts.
    """
    newest = session.newest()
    if not newest:
        return None
    before = newest[0].parent
    among = [*newest, *([] if before is None else [before])]
    turn = session.find(messages, reasoning=reasoning, among=among)
    if turn is None and before is not None:
        raise NotLinear(f"{_difference(messages, newest[0].history(), reasoning)}. {_ADVICE}", param="messages")
    return turn


def taken_back(session: Session, prompt: Prompt) -> tuple[Turn, ...]:
    """The newest answers, if this prompt does not go on from one of them."""
    newest = session.newest()
    return () if prompt.parent in newest else newest


def check_append_only(prompt: Prompt) -> None:
    """Refuse a prompt that had to be rendered in full although the session knows its history.

    Raises:
        NotLinear: with the reason, which has the first difference of the two texts.
    """
    if prompt.note is not None:
        raise NotLinear(f"this request's tokens do not extend the session's: {prompt.note}. {_ADVICE}")


def _difference(messages: Sequence[Message], stored: Sequence[Message], reasoning: bool) -> str:
    """Where the request first says something else than the session, in words."""
    for index, (asked, held) in enumerate(zip(messages, stored, strict=False)):
        if asked.key != held.key:
            return _both(index, asked, held, _said(asked), _said(held))
        if reasoning and asked.reasoning is not None and asked.reasoning != held.reasoning:
            return _both(index, asked, held, asked.reasoning, held.reasoning or "")
    held = stored[len(messages)]
    return (
        f"the request ends before messages[{len(messages)}], where this session has role {held.role!r} with "
        f"{_said(held)[:_SHOWN]!r}, and that takes back more than one answer"
    )


def _both(index: int, asked: Message, held: Message, one: str, two: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    start = max(0, at - _SHOWN // 3)
    return (
        f"messages[{index}] has role {asked.role!r} with {one[start : start + _SHOWN]!r} where this session has role "
        f"{held.role!r} with {two[start : start + _SHOWN]!r} (from character {start})"
    )


def _said(message: Message) -> str:
    """The message's text and, where there are any, its tool calls."""
    calls = [call["function"] for call in message.plain.get("tool_calls", ())]
    text: str = message.plain["content"]
    return text + (json.dumps(calls, ensure_ascii=False) if calls else "")
