"""Token in, token out: which tokens a request appends to a turn that it extends.

The parent's tokens stay as they were sampled; only the suffix is tokenised. That is right if the template writes the
longer conversation as the shorter one plus a suffix, which is proven on every request by comparing texts. Where it is
not so, the request is rendered in full as a new root.

Boundaries. `Template.closing` and the next role's opener follow an answer. A sampled stop token that equals the first
token of these stays, and the suffix starts after it; one that differs gives way to it (`Prompt.drop`). After an answer
that ended by length the whole closing follows, not generated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from hashlib import blake2b

import numpy as np

from pacenote.rollout.errors import RoleNotAllowed
from pacenote.rollout.messages import Message
from pacenote.rollout.template import Arguments, Template, Tools, first_difference
from pacenote.rollout.turn import Prompt, Render, Turn

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
    rewritten = None
    if parent is not None:
        old = template.render(
            stored, tools=parent.prompt.render.tools, arguments=parent.prompt.render.arguments, generation=False
        )
        rewritten = _rewritten(template, parent, old, new)
    if parent is None or rewritten:
        parent, stored, text, lead = None, [], new, 0
    else:
        text, lead = template.closing + new[len(old) :], len(old) - len(template.closing)
    ids, starts = template.encode(text)
    skip = drop = 0
    if parent is not None and parent.answer.stopped:
        skip = int(bool(ids) and ids[0] == int(parent.answer.ids[-1]))
        drop = 1 - skip
    render, ends = _ends(template, whole, len(stored), new, tools, arguments)
    cuts = [bisect_left(starts, end - lead) for end in ends]
    appended = tuple(whole[len(stored) :])
    return Prompt(
        parent=parent,
        appended=appended,
        drop=drop,
        ids=np.array(ids[skip:], dtype=np.int32),
        spans=_spans([message.role for message in appended], [max(0, cut - skip) for cut in cuts], len(ids) - skip),
        path=path,
        render=render,
        note=rewritten,
    )


def _rewritten(template: Template, parent: Turn, old: str, new: str) -> str | None:
    """None if the parent's tokens stand for the start of `new`, else the reason why they do not."""
    render = parent.prompt.render
    if _digest(old[: render.length]) != render.digest or not old.endswith(template.closing):
        return "the template rewrites a prompt once it is answered"
    difference = first_difference(old, new)
    return None if difference is None else f"the template, its arguments or the tools rewrite history: {difference}"


def _ends(
    template: Template, whole: Sequence[Message], start: int, new: str, tools: Tools, arguments: Arguments
) -> tuple[Render, list[int]]:
    """The proof for the next turn, and the character of `new` at which each message from `start` on ends.

    A message whose end cannot be told, because the template rewrites it when the next one comes, ends where the one
    before it does.
    """
    header = template.header(arguments)
    if header is not None and new.endswith(header):
        bare = new[: len(new) - len(header)]
    else:
        bare = template.render(whole, tools=tools, arguments=arguments, generation=False)
    ends: list[int] = []
    for count in range(start + 1, len(whole)):
        part = template.render(whole[:count], tools=tools, arguments=arguments, generation=False)
        ends.append(len(part) if new.startswith(part) else (ends[-1] if ends else 0))
    if len(whole) > start:
        ends.append(len(bare))
    return Render(length=len(bare), digest=_digest(bare), tools=tools, arguments=arguments), ends


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
