"""What a chat template does with history: conversations played turn by turn, as a session plays them.

Each answer is sampled by the book: its tokens are those of the text that the template itself writes for it, then a stop
token or, as if cut by length, none. The prompt of the next turn comes from `tito.extend` and is compared with the
template's text tokenised anew. Where the answer ends at a special token, what was appended must be that text's last
tokens, and the whole prompt must be its tokens if all answers were sampled as the template spells them (it may write an
empty thought that no model samples). Where no special token ends it, tokens may merge, which is counted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pacenote.rollout.messages import ROOT, Message
from pacenote.rollout.orders import TOOLS, Conversation, well_formed
from pacenote.rollout.template import Arguments, Template, TemplateError, Tools, shared
from pacenote.rollout.tito import extend
from pacenote.rollout.turn import Answer, Prompt, Turn

APPENDS, REWRITES, LEFT_OUT, REFUSED = "append-only", "rewrites", "left out", "refused"
Order = tuple[str, tuple[str, ...]]


@dataclass(slots=True)
class Proof:
    """What was seen.

    Attributes:
        outcomes: order (kind of the last answer, roles appended) -> outcome -> how often.
        reasons: (order, outcome) -> the first reason.
        equal, apart: prompts equal to the text tokenised anew, and not.
        wrong: prompts that had to be equal and were not, described.
    """

    outcomes: dict[Order, Counter[str]] = field(default_factory=dict)
    reasons: dict[tuple[Order, str], str] = field(default_factory=dict)
    equal: int = 0
    apart: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, order: Order, outcome: str, reason: str = "") -> None:
        """Count one."""
        self.outcomes.setdefault(order, Counter())[outcome] += 1
        if reason:
            self.reasons.setdefault((order, outcome), reason)

    def unproven(self, roles: Iterable[str]) -> list[tuple[Order, str]]:
        """Well-formed orders of these roles with an outcome other than append-only, and that outcome."""
        allowed = set(roles)
        return [
            (order, outcome)
            for order, counts in self.outcomes.items()
            if order[1] and set(order[1]) <= allowed and well_formed(*order)
            for outcome in counts
            if outcome != APPENDS
        ]


class Stage:
    """Plays conversations on a template.

    Args:
        template: to be proven.
        arguments: template arguments, as `Template.arguments` gives them.
        seed: of the choice of stop tokens.
    """

    def __init__(self, template: Template, arguments: Arguments, *, seed: int = 0) -> None:
        self._template, self._arguments = template, arguments
        self._draw = random.Random(seed)
        self._stops = stop_ids(template)
        self.proof = Proof()

    def play(self, conversation: Conversation) -> None:
        """One conversation, up to where the template refuses."""
        tools = TOOLS if conversation.tools else None
        messages: list[Message] = []
        parent: Turn | None = None
        kind, exact = "", True
        for step in conversation.steps:
            messages += step.appended
            order = (kind, tuple(message.role for message in step.appended))
            try:
                prompt = self._prompt(messages, parent, tools)
                text = self._render(messages, tools, generation=True)
                answer = sample(self._template, messages, step.answer, tools, self._arguments)
            except TemplateError as error:
                if parent is not None:
                    self.proof.note(order, REFUSED, str(error))
                return
            if parent is not None:
                self._judge(order, prompt, parent, text, [word for word in step.words if word not in text])
            exact = self._compare(prompt, text, exact or prompt.parent is None, order) and answer.exact
            ends = [*self._stops.values(), *([None] if answer.ids else [])]
            if not ends:  # an answer of no tokens at all is none
                return
            parent = turn(prompt, step.answer, answer, self._draw.choice(ends))
            messages.append(step.answer)
            kind = step.kind

    def _judge(self, order: Order, prompt: Prompt, parent: Turn, text: str, missing: list[str]) -> None:
        if missing:
            self.proof.note(order, LEFT_OUT, "the template does not write the appended message")
        elif prompt.parent is not parent:
            self.proof.note(order, REWRITES, prompt.note or "")
        else:
            self.proof.note(order, APPENDS)

    def _compare(self, prompt: Prompt, text: str, exact: bool, order: Order) -> bool:
        """Whether the prompt's tokens are those of its text. If it had to be so and is not, that is noted.

        Args:
            prompt: of the turn.
            text: of all its messages.
            exact: all answers so far were sampled as the template spells them.
            order: for the note.
        """
        ids = self._template.encode(text)[0]
        equal: bool = prompt.token_ids().tolist() == ids
        tail = ids[len(ids) - len(prompt.ids) :]
        if self._special_boundary(prompt) and (tail != prompt.ids.tolist() or (exact and not equal)):
            self.proof.wrong.append(f"{_name(order)}: {text[-200:]!r}")
        self.proof.equal += equal
        self.proof.apart += not equal
        return equal

    def _special_boundary(self, prompt: Prompt) -> bool:
        if prompt.parent is None:
            return True
        kept = prompt.parent.answer.stopped and not prompt.drop
        first = int(prompt.parent.answer.ids[-1]) if kept else int(prompt.ids[0]) if len(prompt.ids) else -1
        return self._template.is_special(first)

    def _prompt(self, messages: list[Message], parent: Turn | None, tools: Tools) -> Prompt:
        return extend(self._template, messages, parent=parent, path=ROOT, tools=tools, arguments=self._arguments)

    def _render(self, messages: list[Message], tools: Tools, *, generation: bool) -> str:
        return self._template.render(messages, tools=tools, arguments=self._arguments, generation=generation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """An answer's tokens.

    Attributes:
        ids: without what closes it.
        closing: what the template closes it with.
        exact: the prompt's tokens, `ids` and `closing` are the text's, tokenised as one.
    """

    ids: list[int]
    closing: list[int]
    exact: bool

    def stopped_by(self, stop: int | None) -> list[int]:
        """All that is sampled up to a stop token: the closing, too, if the token stands in it. None is no stop."""
        if stop is None:
            return self.ids
        before = self.closing[: self.closing.index(stop)] if stop in self.closing else []
        return [*self.ids, *before, stop]


def sample(template: Template, messages: list[Message], answer: Message, tools: Tools, arguments: Arguments) -> Sampled:
    """The tokens of an answer as the template writes it.

    Raises:
        TemplateError: the template refuses it.
    """
    prompt = template.render(messages, tools=tools, arguments=arguments, generation=True)
    text = template.render([*messages, answer], tools=tools, arguments=arguments, generation=False)
    history, end = template.past(text) or (text, "")
    before, whole, closing = (template.encode(part)[0] for part in (prompt, history, end))
    stop = len(whole) - len(closing)
    if whole[: len(before)] == before and whole[stop:] == closing:
        return Sampled(ids=whole[len(before) : stop], closing=closing, exact=True)
    said = history[shared(prompt, history) : len(history) - len(end)]
    return Sampled(ids=template.encode(said)[0], closing=closing, exact=False)


def turn(prompt: Prompt, message: Message, sampled: Sampled, stop: int | None) -> Turn:
    """A committed turn whose answer was sampled, up to this stop token; None: cut by length."""
    ids = sampled.stopped_by(stop)
    count = len(ids)
    answer = Answer(
        message=message,
        ids=np.array(ids, dtype=np.int32),
        logprobs=np.zeros(count, dtype=np.float32),
        versions=np.zeros(count, dtype=np.int32),
        version_name="0",
        rows=None,
        finish="length" if stop is None else "stop",
        stopped=stop is not None,
    )
    return Turn(number=0, id="", prompt=prompt, answer=answer, path=ROOT, created=0.0)


def stop_ids(template: Template) -> Mapping[str, int]:
    """The family's stop tokens that the vocabulary holds; for `default`, the last special one of each closing."""
    found: dict[str, int] = {}
    for stop in template.family.stops:
        ids = template.encode(stop)[0]
        if len(ids) == 1 and template.is_special(ids[0]):
            found[stop] = ids[0]
    for closing in template.closings if not template.family.stops else ():
        special = [token for token in template.encode(closing)[0] if template.is_special(token)]
        found |= {template.decode(special[-1:]): special[-1]} if special else {}
    return found


def _name(order: Order) -> str:
    return f"{order[0] or 'root'} + {' + '.join(order[1]) or 'nothing'}"


def plain(proof: Proof) -> dict[str, Any]:
    """As JSON."""
    return {
        "orders": [
            {
                "answer": kind,
                "appended": list(roles),
                "well_formed": well_formed(kind, roles),
                "outcomes": dict(counts),
                "reasons": {
                    outcome: text for (order, outcome), text in proof.reasons.items() if order == (kind, roles)
                },
            }
            for (kind, roles), counts in proof.outcomes.items()
        ],
        "round_trip": {"equal": proof.equal, "apart": proof.apart, "wrong": len(proof.wrong)},
    }
