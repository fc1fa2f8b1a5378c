"""Ends of messages: as rendering every prefix finds them, from a bounded number of renders."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.families import FAMILIES, detect_family
from pacenote.rollout.messages import ROOT, Message, parse_message
from pacenote.rollout.orders import KINDS, TOOLS, step
from pacenote.rollout.spans import FEW, MOST, Rendered, message_ends
from pacenote.rollout.template import Template
from pacenote.rollout.tito import extend
from tests.rollout.tokenizers import source, tokenizer

BARE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
COUNTS = BARE.replace("{{ m.content }}", "{{ m.content | length }} {{ m.content }}")


@cache
def template(name: str) -> Template:
    if name not in ("bare", "counts"):
        made = tokenizer(name)
        return Template(made, detect_family(made.get_vocab(), source(name)))
    made = tokenizer("glm47")
    made.chat_template = BARE if name == "bare" else COUNTS
    return Template(made, FAMILIES["default"])


class Counting:
    """A template's renders, counted while this is entered."""

    def __init__(self, template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
        self.renders = 0
        render = template._tokenizer.apply_chat_template

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.renders += 1
            return render(*args, **kwargs)

        monkeypatch.setattr(template._tokenizer, "apply_chat_template", counted)


def talk(turns: int, seed: int = 0) -> list[Message]:
    """A conversation of an agent: system, then questions, answers of all kinds, and tools' messages."""
    draw = random.Random(seed)
    messages = [*step(draw, ["system"], "plain").appended]
    for number in range(turns):
        kind = KINDS[number % len(KINDS)]
        now = step(draw, ["user"], kind)
        calls = {"call": 1, "call after thinking": 1, "two calls": 2}.get(kind, 0)
        messages += [*now.appended, now.answer, *step(draw, ["tool"] * calls, "plain").appended]
    return [*messages, *step(draw, ["user"], "plain").appended]


def whole(made: Template, messages: Sequence[Message], tools: Any = None) -> Rendered:
    arguments = made.arguments(None)
    text = made.render(messages, tools=tools, arguments=arguments, generation=True)
    return Rendered(messages=messages, text=text, tools=tools, arguments=arguments)


def words(message: Message) -> str:
    return str(message.plain["content"]).partition(" ")[0].partition("\n")[0]


@pytest.mark.parametrize(
    "name", ["glm47", "qwen3", "qwen35", "deepseek32", "deepseek31", "kimi_k2", "minimax", "gpt_oss", "bare", "counts"]
)
def test_a_long_root_takes_few_renders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = template(name)
    messages = talk(100)
    made.header(made.arguments(None))
    counting = Counting(made, monkeypatch)
    prompt = extend(made, messages, parent=None, path=ROOT, tools=TOOLS, arguments=made.arguments(None))
    assert len(messages) > 240
    assert counting.renders <= MOST + 5  # the text and the messages without the header, besides
    assert len(prompt.spans) == len(messages) + 1
    assert sum(tokens for _, tokens in prompt.spans) == len(prompt.ids)


@pytest.mark.parametrize("name", ["glm47", "qwen35", "deepseek32", "kimi_k2", "minimax", "gpt_oss", "qwen3"])
def test_words_stand_in_their_own_message(name: str) -> None:
    """Also where prefixes do not tell: a template rewrites, or closes two tools' messages only once."""
    made = template(name)
    messages = talk(30)
    rendered = whole(made, messages, TOOLS)
    ends = message_ends(made, rendered, 0, len(rendered.text))
    pieces = [rendered.text[a:b] for a, b in pairwise([0, *ends])]
    misplaced = [(m.role, p) for m, p in zip(messages, pieces, strict=True) if words(m) and words(m) not in p]
    assert misplaced == []


@pytest.mark.parametrize("name", ["glm47", "deepseek32", "kimi_k2", "bare"])
def test_ends_are_those_of_the_prefixes(name: str) -> None:
    """On templates whose every prefix is a prefix, marks find what rendering each would."""
    made = template(name)
    roles = ["system", "user", "tool", "assistant"] if name != "deepseek32" else ["system", "user", "assistant"]

    @settings(max_examples=40, deadline=None)
    @given(
        roles=st.lists(st.sampled_from(roles), min_size=FEW + 2, max_size=14),
        texts=st.lists(
            st.sampled_from(["", " ", "a", " a", "\nb\n", "</think>c", "<think>d</think>e", "{}"]), min_size=14
        ),
        start=st.integers(0, 3),
    )
    def run(roles: list[str], texts: list[str], start: int) -> None:
        messages = [parse_message({"role": r, "content": t}, "m") for r, t in zip(roles, texts, strict=False)]
        rendered = whole(made, messages)
        last = len(rendered.prefix(made, len(messages)))
        exact = [len(rendered.prefix(made, count)) for count in range(start + 1, len(messages) + 1)]
        assert message_ends(made, rendered, start, last) == exact

    run()


def test_a_question_to_come_does_not_spoil_a_prefix() -> None:
    """Qwen3.5's template refuses a conversation without a user, so the system message alone cannot be rendered."""
    made = template("qwen35")
    messages = [parse_message({"role": role, "content": role}, "m") for role in ("system", "user")]
    prompt = extend(made, messages, parent=None, path=ROOT, tools=None, arguments=made.arguments(None))
    system = "<|im_start|>system\nsystem<|im_end|>\n"
    assert prompt.spans[0] == ("system", len(made.encode(system)[0]))


def test_no_messages() -> None:
    made = template("bare")
    messages = [parse_message({"role": "user", "content": "a"}, "m")]
    assert message_ends(made, whole(made, messages), 1, 9) == []
    assert message_ends(made, whole(made, messages), 0, 9) == [9]
