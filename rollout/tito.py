"""Token in, token out: which tokens a request appends to a turn that it extends.

The parent's tokens stay as they were sampled; only the suffix is tokenised. That is right if the template writes the
longer conversation as the shorter one plus a suffix, which is proven on every request by comparing texts. Where it is
not so, the request is rendered in full as a new root.

Boundaries. A closing (`Template.past`) and the next role's opener follow an answer. A sampled stop token that is part
of the closing, or that is the opener where nothing closes, stays, and the suffix starts after it; another one gives way
(`Prompt.drop`). After an answer that ended by length the whole closing follows, not generated.

Thinking. It stays in history if the template writes it back, and goes if the template leaves it out: then the request
is rendered in full, too, as the model would see it anywhere else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from hashlib import blake2b

import numpy as np

from pacenote.rollout.errors import RoleNotAllowed
from pacenote.rollout.messages import Message
from pacenote.rollout.spans import Rendered, message_ends
from pacenote.rollout.template import Arguments, Template, Tools, first_difference
from pacenote.rollout.turn import Answer, Prompt, Render, Turn

FLAG = "--tito-allowed-append-roles"


def check_roles(messages: Sequence[Message], start: int, allowed: Collection[str]) -> None:
    """Check the roles of the messages from index `start` on, which follow a generated answer.

    Raises:
        RoleNotAllowed: names the first wrong index, its role, the allowed roles and the flag.
    """
    for index in range(start, len(messages)):
        if messages[index].role not in allowed:
            raise RoleNotAllowed(
                f"messages[{index}] has role {messages[index].role!r}, but only {', '.join(sorted(allowed))} may be "
                f"appended to this session's history: start the session server with {FLAG} to allow more",
                param=f"messages[{index}].role",
            )


def extend(
    template: Template,
    messages: Sequence[Message],
    *,
    parent: Turn | None,
    path: bytes,
    tools: Tools,
    arguments: Arguments,
) -> Prompt:
    """Render a request.

    Args:
        template: the model's.
        messages: all of the request's; those of `parent.history()` come first and are taken from there.
        parent: the turn to extend, or None for a root.
        path: digest of all the messages.
        tools: the request's.
        arguments: template arguments of the request.

    Raises:
        TemplateError: the template refuses the messages.
    """
    stored = parent.history() if parent else []
    whole = [*stored, *messages[len(stored) :]]
    new = template.render(whole, tools=tools, arguments=arguments, generation=True)
    lead, closing, rewritten = 0, 0, None
    if parent is not None:
        lead, closing, rewritten = _continue(template, parent, stored, new)
    if rewritten:
        parent, stored = None, []
    ids, starts = template.encode(new[lead:])
    skip = drop = 0
    if parent is not None:
        skip, drop = _join(template, parent.answer, ids, bisect_left(starts, closing))
    bare = _bare(template, whole, new, tools, arguments)
    rendered = Rendered(messages=whole, text=new, tools=tools, arguments=arguments)
    cuts = [bisect_left(starts, end - lead) for end in message_ends(template, rendered, len(stored), len(bare))]
    appended = tuple(whole[len(stored) :])
    return Prompt(
        parent=parent,
        appended=appended,
        drop=drop,
        ids=np.array(ids[skip:], dtype=np.int32),
        spans=_spans([message.role for message in appended], [max(0, cut - skip) for cut in cuts], len(ids) - skip),
        path=path,
        render=Render(length=len(bare), digest=_digest(bare), tools=tools, arguments=arguments),
        note=rewritten,
    )


def _continue(template: Template, parent: Turn, stored: Sequence[Message], new: str) -> tuple[int, int, str | None]:
    """The character of `new` at which the closing of the parent's answer starts, the closing's length, and None.

    If the parent's tokens do not stand for what comes before it: 0, 0 and the reason.
    """
    render = parent.prompt.render
    old = template.render(stored, tools=render.tools, arguments=render.arguments, generation=False)
    past = template.past(old)
    if past is None or _digest(old[: render.length]) != render.digest:
        return 0, 0, "the template rewrites a prompt once it is answered"
    history, closing = past
    difference = first_difference(history, new)
    if difference is not None:
        return 0, 0, f"the template, its arguments or the tools rewrite history: {difference}"
    thought = parent.answer.message.reasoning
    if thought is not None and thought.strip() not in history[render.length :]:
        return 0, 0, "the template leaves the thinking of an answered turn out of history"
    return len(history) - len(closing), len(closing), None


def _join(template: Template, answer: Answer, ids: Sequence[int], closing: int) -> tuple[int, int]:
    """How many of the tokens to append the answer ends with already, and 1 if its stop token gives way, else 0.

    Args:
        template: tells special tokens.
        answer: the parent's.
        ids: tokens of the closing and of what follows.
        closing: how many of them are the closing's; without any, the next opener closes the answer.
    """
    said, drop = answer.ids.tolist(), 0
    if answer.stopped:
        for count in range(min(max(closing, 1), len(ids), len(said)), 0, -1):
            if said[-count:] == ids[:count]:
                return count, 0
        said, drop = said[:-1], 1
    # The answer was cut within a closing of several tokens. Ordinary text that looks like one is the answer's own.
    if ids and template.is_special(ids[0]):
        for count in range(min(closing, len(said)), 0, -1):
            if said[-count:] == ids[:count]:
                return count, drop
    return 0, drop


def _bare(template: Template, whole: Sequence[Message], new: str, tools: Tools, arguments: Arguments) -> str:
    """`new` without the header of the answer, that is, the messages alone."""
    header = template.header(arguments)
    if header is not None and new.endswith(header):
        return new[: len(new) - len(header)]
    return template.render(whole, tools=tools, arguments=arguments, generation=False)


def _spans(roles: Sequence[str], cuts: Sequence[int], total: int) -> tuple[tuple[str, int], ...]:
    """(role, tokens) of each message and of the answer's header, from the tokens at which the messages end."""
    spans = []
    position = 0
    for role, cut in zip(roles, cuts, strict=True):
        stop = min(max(cut, position), total)
        spans.append((role, stop - position))
        position = stop
    return (*spans, ("assistant", total - position))


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
