"""Where each message of a rendered conversation ends.

Asking the template for every prefix is quadratic in the messages of a new root. So a long list, or one whose prefixes
do not tell, is rendered once more with a mark in each message. If the text is the same without the marks, they say
where the messages stand. What lies between a message's end and the next one's mark is an opener that depends on little
more than the two roles, so it is learnt from one prefix for each kind of pair, and recognised wherever it recurs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

from pacenote.rollout.messages import Message
from pacenote.rollout.template import Arguments, Template, TemplateError, Tools, shared

FEW = 4  # messages that are not worth a mark
MOST = 24  # prefixes that are rendered at most, whatever the template does

Marks = Mapping[int, tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation and its text.

    Attributes:
        messages: all of it.
        text: as rendered.
        tools, arguments: what it was rendered with.
    """

    messages: Sequence[Message]
    text: str
    tools: Tools
    arguments: Arguments

    def prefix(self, template: Template, count: int) -> str:
        """The first `count` messages, rendered alone."""
        return template.render(self.messages[:count], tools=self.tools, arguments=self.arguments, generation=False)


def message_ends(template: Template, whole: Rendered, start: int, last: int) -> list[int]:
    """The character of the text at which each message from index `start` on ends.

    A message whose end cannot be told, because the template rewrites it when the next one comes, ends where the one
    before it does. Renders at most MOST + 3 times.

    Args:
        template: the model's.
        whole: the conversation.
        start: index of the first message that is asked for.
        last: where the last message ends.
    """
    inner = range(start, len(whole.messages) - 1)
    search = _Search(template, whole, start, many=len(inner) > FEW)
    ends: list[int] = []
    for index in inner:
        end = search.end(index)
        floor = ends[-1] if ends else 0
        ends.append(floor if end is None else max(floor, end))
    return [*ends, last] if len(whole.messages) > start else []


class _Search:
    """Ends of messages, and the openers learnt on the way."""

    def __init__(self, template: Template, whole: Rendered, start: int, *, many: bool) -> None:
        self._template, self._whole, self._start, self._many = template, whole, start, many
        self._openers: dict[tuple[object, ...], str] = {}
        self._left = MOST

    @cached_property
    def _marks(self) -> Marks:
        return _marks(self._template, self._whole, self._start)

    def end(self, index: int) -> int | None:
        """Where a message ends, which is not the last; None if it cannot be told."""
        told = index + 1 in self._marks if self._many else False
        end = None if told else self._by_prefix(index)
        if end is not None or index + 1 not in self._marks:
            return end
        at, kind = self._marks[index + 1]
        text, messages = self._whole.text, self._whole.messages
        pair = (messages[index].role, "tool_calls" in messages[index].plain, messages[index + 1].role, kind)
        opener = self._openers.get(pair)
        if opener is not None and text.endswith(opener, 0, at):
            return at - len(opener)
        end = self._by_prefix(index) if self._many else None
        if end is None or end > at:
            return self._by_closing(index, at)
        self._openers[pair] = text[end:at]
        return end

    def _by_prefix(self, index: int) -> int | None:
        """Where the messages up to this one end if they are rendered alone, and the text starts like that."""
        if self._left == 0:
            return None
        self._left -= 1
        text = self._whole.text
        try:
            part = self._whole.prefix(self._template, index + 1)
        except TemplateError:  # templates may ask for a user's message, which is yet to come
            return None
        if self._whole.messages[index].role == "assistant":
            part = (self._template.past(part) or (part, ""))[0]
        if text.startswith(part):
            return len(part)
        # What follows may replace the closing, as between two tools' messages; the message itself must be there.
        same, mark = shared(text, part), self._marks.get(index)
        content = str(self._whole.messages[index].plain["content"]).strip()
        return same if mark is not None and same >= mark[0] + max(1, len(content)) else None

    def _by_closing(self, index: int, before: int) -> int | None:
        """Where the last closing before that character ends, for templates that close every message alike."""
        if index not in self._marks:
            return None
        start, text = self._marks[index][0], self._whole.text
        found = [(text.rfind(end, start, before), end) for end in self._template.closings if end.strip()]
        return max((at + len(end) for at, end in found if at >= 0), default=None)


def _marks(template: Template, whole: Rendered, start: int) -> Marks:
    """Index of a message -> a character within it and the field that begins there; empty if marks change the text."""
    word = "zq" + blake2b(whole.text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    if word in whole.text:
        return {}
    pattern = re.compile(word + "([0-9]+)([a-z])z")
    # Some templates strip white space, and some write other things if a text is not empty.
    for strip, blank in ((False, True), (True, True), (True, False)):
        marked = [
            message if index < start else _marked(message, f"{word}{index}", strip=strip, blank=blank)
            for index, message in enumerate(whole.messages)
        ]
        text = template.render(marked, tools=whole.tools, arguments=whole.arguments, generation=True)
        if pattern.sub("", text) == whole.text:
            return _places(pattern, text)
    return {}


def _places(pattern: re.Pattern[str], text: str) -> Marks:
    """The first place of each message's marks, in the text without them."""
    found: dict[int, tuple[int, str]] = {}
    removed = 0
    for match in pattern.finditer(text):
        found.setdefault(int(match[1]), (match.start() - removed, match[2]))
        removed += len(match[0])
    return found


def _marked(message: Message, word: str, *, strip: bool, blank: bool) -> Message:
    """The message with a mark at the start of each of its texts.

    Args:
        message: it.
        word: what marks of this message start with.
        strip: mark behind leading white space.
        blank: mark an empty content, too.
    """

    def insert(text: str, mark: str) -> str:
        space = len(text) - len(text.lstrip()) if strip else 0
        return text[:space] + mark + text[space:]

    plain: dict[str, Any] = dict(message.plain)
    content = str(plain["content"])
    if content.strip() or (blank and not plain.get("tool_calls")):
        plain["content"] = insert(content, word + "cz")
    if message.reasoning:
        plain["reasoning_content"] = insert(message.reasoning, word + "rz")
    if plain.get("tool_calls"):
        first, *rest = plain["tool_calls"]
        named = first["function"] | {"name": f"{word}nz{first['function']['name']}"}
        plain["tool_calls"] = [first | {"function": named}, *rest]
    return replace(message, plain=plain)
