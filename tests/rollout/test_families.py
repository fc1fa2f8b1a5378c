"""Families: found by vocabulary and template, measured, and held against a second account of what templates rewrite."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.errors import StartupError
from pacenote.rollout.families import FAMILIES, KEPT, STRIPPED, UNTIL_ANSWERED, detect_family
from pacenote.rollout.messages import ROLES, ROOT, Message, parse_message
from pacenote.rollout.orders import KINDS, TOOLS, step, well_formed
from pacenote.rollout.proof import sample, turn
from pacenote.rollout.template import Template
from pacenote.rollout.tito import extend
from pacenote.rollout.turn import Turn
from pacenote.rollout.verify import verify_command
from tests.rollout import families_table
from tests.rollout.tokenizers import NAMES, source, tokenizer

ROOT_DIR = Path(__file__).resolve().parents[2]
SYSTEM_FIRST = ("qwen35", "minimax", "gpt_oss")
Written = dict[int, str]


@cache
def template(name: str, family: str = "auto") -> Template:
    """The named tokenizer's template, as the family that it is found to be; "loose": with nothing fixed."""
    made = tokenizer(name)
    found = detect_family(made.get_vocab(), source(name))
    return Template(made, replace(found, fixed={}) if family == "loose" else found)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_found(name: str) -> None:
    assert template(name).family.name == {"deepseek31": "deepseek32"}.get(name, name)


def test_families_are_told_apart_by_what_the_vocabularies_lack() -> None:
    for family in FAMILIES.values():
        if family.name == "default":
            assert detect_family(set(), "anything").name == "default"
            continue
        assert detect_family(family.markers, " ".join(family.words)) is family
        for marker in family.markers:
            assert detect_family(family.markers - {marker}, " ".join(family.words)).name == "default"
    chatml = FAMILIES["qwen3"].markers
    assert detect_family(chatml, "<tool_call> and no thought").name == "default"


@pytest.mark.parametrize(
    ("name", "closing", "header", "thinking", "rewrites"),
    [
        ("glm47", "", "<|assistant|><think>", KEPT, set()),
        ("qwen3", "<|im_end|>\n", "<|im_start|>assistant\n", UNTIL_ANSWERED, set(ROLES)),
        ("qwennext", "<|im_end|>\n", "<|im_start|>assistant\n<think>\n", UNTIL_ANSWERED, set(ROLES)),
        ("qwen35", "<|im_end|>\n", "<|im_start|>assistant\n<think>\n", KEPT, set()),
        ("deepseek32", "<｜end▁of▁sentence｜>", "", KEPT, set()),
        ("deepseek31", "<｜end▁of▁sentence｜>", "<｜Assistant｜></think>", STRIPPED, {"system"}),
        ("kimi_k2", "<|im_end|>", "<|im_assistant|>assistant<|im_middle|><think>", KEPT, set()),
        ("minimax", "[e~[\n", "]~b]ai\n<think>\n", UNTIL_ANSWERED, set()),
        ("gpt_oss", "<|end|>", "<|start|>assistant", UNTIL_ANSWERED, set()),
    ],
)  # fmt: skip
def test_what_is_measured(name: str, closing: str, header: str, thinking: str, rewrites: set[str]) -> None:
    roles = set(ROLES) - ({"system"} if name in SYSTEM_FIRST else set())
    made = Template(template(name)._tokenizer, template(name).family, append_roles=roles)
    assert (made.closing, made.thinking, set(made.rewrites)) == (closing, thinking, rewrites)
    assert made.header(made.arguments(None)) == header


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen35", "allows an appended system message .* a system message must come first; leave system out of --tito"),
        ("minimax", "writes an appended system message .family minimax., got one that leaves it out; leave system out"),
        ("gpt_oss", "writes an appended system message .family gpt_oss., got one that leaves it out; leave system out"),
    ],
)
def test_roles_that_a_template_refuses_or_leaves_out(name: str, text: str) -> None:
    with pytest.raises(StartupError, match=text):
        Template(template(name)._tokenizer, template(name).family, append_roles=["system"])


def test_arguments_of_calls_come_as_the_template_reads_them() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": [1, "é"]}'}}
    messages = [parse_message(m, "m") for m in ({"role": "user"}, {"role": "assistant", "tool_calls": [call]})]
    texts = {
        name: template(name).render(messages, tools=None, arguments={}, generation=False)
        for name in ("deepseek31", "deepseek32", "qwen3", "glm47")
    }
    assert '<｜tool▁sep｜>{"a": [1, "é"]}<' in texts["deepseek31"]
    assert '<｜DSML｜parameter name="a" string="false">[1, "é"]<' in texts["deepseek32"]
    assert '"arguments": {"a": [1, "é"]}}' in texts["qwen3"]
    assert '<arg_key>a</arg_key><arg_value>[1, "é"]</arg_value>' in texts["glm47"]


def test_harmony_takes_one_text_before_a_call() -> None:
    """Its template raises for thinking and content beside a call, which a model may well write."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    reply = {"role": "assistant", "content": "Looking.", "reasoning_content": "Hm.", "tool_calls": [call]}
    messages = [parse_message({"role": "user", "content": "q"}, "m"), parse_message(reply, "m")]
    text = template("gpt_oss").render(messages, tools=None, arguments={}, generation=False)
    assert "<|channel|>analysis<|message|>Hm.\nLooking.<|end|><|start|>assistant to=functions.f" in text


def test_effort_and_thinking_switches_reach_the_template() -> None:
    asked = [parse_message({"role": "user", "content": "q"}, "m")]

    def prompt(name: str, requested: dict[str, Any] | None = None, effort: object = None) -> str:
        made = template(name)
        return made.render(asked, tools=None, arguments=made.arguments(requested, effort), generation=True)

    assert "Reasoning: high" in prompt("gpt_oss", None, "high")
    assert prompt("qwen3", {"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert prompt("deepseek32", {"thinking": False}).endswith("<｜Assistant｜></think>")
    assert prompt("kimi_k2", {"thinking": False}).endswith("<think></think>")


def last(messages: Sequence[Message], fits: Callable[[Message], bool]) -> int:
    return max((index for index, message in enumerate(messages) if fits(message)), default=-1)


def asked(messages: Sequence[Message]) -> int:
    return last(messages, lambda message: message.role == "user")


def answered(messages: Sequence[Message]) -> int:
    return last(messages, lambda message: message.role == "assistant" and "tool_calls" not in message.plain)


def thoughts(messages: Sequence[Message], keep: Callable[[int, Message], bool], *, blank: bool = False) -> Written:
    """Index of an assistant's message -> the thinking that is written there, if any is."""
    return {
        index: message.reasoning or ""
        for index, message in enumerate(messages)
        if message.role == "assistant" and keep(index, message) and (blank or message.reasoning)
    }


def of_qwen3(messages: Sequence[Message], done: bool) -> Written:
    end = len(messages) - 1
    return thoughts(messages, lambda i, m: i > asked(messages) and (i == end or bool(m.reasoning)), blank=True)


def of_minimax(messages: Sequence[Message], done: bool) -> Written:
    return thoughts(messages, lambda i, m: i > asked(messages))


def of_kimi(messages: Sequence[Message], done: bool) -> Written:
    return thoughts(messages, lambda i, m: i > answered(messages))


def of_harmony(messages: Sequence[Message], done: bool) -> Written:
    """Before a call, content is written as thinking. `done`: the last answer is the last message and is shown whole."""
    final, end = answered(messages), len(messages) - 1
    calls = {
        i: "\n".join(filter(None, [m.reasoning, str(m.plain["content"])]))
        for i, m in enumerate(messages)
        if "tool_calls" in m.plain and i > final
    }
    shown = {end: messages[end].reasoning} if done and final == end and messages[end].reasoning else {}
    return {i: text for i, text in (calls | shown).items() if text}


def of_v31(messages: Sequence[Message], done: bool) -> Written:
    """No thinking; but the system messages of the whole conversation stand at the top."""
    return {-1: "\n\n".join(str(message.plain["content"]) for message in messages if message.role == "system")}


REWRITING = {
    ("qwen3", "auto"): of_qwen3,
    ("qwennext", "auto"): of_qwen3,
    ("minimax", "auto"): of_minimax,
    ("kimi_k2", "loose"): of_kimi,  # without the argument: as before K2.6
    ("gpt_oss", "auto"): of_harmony,
    ("deepseek31", "auto"): of_v31,
}
GROWING = [("glm47", "auto"), ("qwen35", "auto"), ("deepseek32", "auto"), ("kimi_k2", "auto")]


def expected(name: str, family: str, asked_for: int, stored: Sequence[Message], whole: Sequence[Message]) -> bool:
    """Whether history is rewritten, by what the format writes of thoughts: in the prompt, once answered, and now."""
    written = REWRITING.get((name, family))
    if written is None:
        return False
    prompt, done, now = written(stored[:asked_for], False), written(stored, True), written(whole, False)
    lost = stored[-1].reasoning and stored[-1].reasoning not in done.get(len(stored) - 1, "")
    return bool(
        prompt != {i: t for i, t in done.items() if i < asked_for}
        or done != {i: t for i, t in now.items() if i < len(stored)}
        or lost
    )


@st.composite
def steps(draw: st.DrawFn, name: str) -> list[tuple[list[str], str]]:
    """(roles to append, kind of the answer) of two to four turns, calls answered or not."""
    roles = [role for role in ROLES if role not in ("tool", *(["system"] if name in SYSTEM_FIRST else []))]
    made = [(draw(st.sampled_from([["user"], ["system", "user"]])), draw(st.sampled_from(KINDS)))]
    for _ in range(draw(st.integers(1, 3))):
        calls = {"call": 1, "call after thinking": 1, "two calls": 2}.get(made[-1][1], 0)
        tools = ["tool"] * calls if draw(st.integers(0, 3)) else []
        made.append((tools + draw(st.lists(st.sampled_from(roles), max_size=3)), draw(st.sampled_from(KINDS))))
    return made


def play(made: Template, plan: list[tuple[list[str], str]], seed: int, judge: Callable[..., None]) -> None:
    """Play turns; `judge` sees each that follows another."""
    draw = random.Random(seed)
    tools = TOOLS if draw.random() < 0.5 else None
    arguments = made.arguments(None)
    ends = [made.encode(stop)[0][0] for stop in made.family.stops or (made.closing,)]
    messages: list[Message] = []
    parent: Turn | None = None
    for roles, kind in plan:
        now = step(draw, roles, kind)
        messages += now.appended
        prompt = extend(made, messages, parent=parent, path=ROOT, tools=tools, arguments=arguments)
        text = made.render(messages, tools=tools, arguments=arguments, generation=True)
        if parent is not None:
            judge(parent, prompt, text, messages)
        said = sample(made, messages, now.answer, tools, arguments)
        parent = turn(prompt, now.answer, said, draw.choice([*ends, *([None] if said.ids else [])]))
        messages.append(now.answer)


@pytest.mark.parametrize(("name", "family"), [*REWRITING, *GROWING])
def test_history_grows_or_a_root_says_why_not(name: str, family: str) -> None:
    """Over orders of roles: a turn goes on from its parent's own tokens unless the format rewrites them."""
    made = template(name, family)
    openers = {made.encode(stop)[0][0] for stop in made.family.stops}

    def judge(parent: Turn, prompt: Any, text: str, messages: list[Message]) -> None:
        stored = parent.history()
        whole_ids = made.encode(text)[0]
        rewritten = expected(name, family, len(stored) - 1, stored, messages)
        assert rewritten == (prompt.parent is None), prompt.note
        assert rewritten == (prompt.note is not None)
        ids = prompt.ids.tolist()
        assert sum(tokens for _, tokens in prompt.spans) == len(ids)
        if rewritten:
            assert (ids, prompt.drop) == (whole_ids, 0)
            return
        held = parent.prompt.token_ids().tolist() + parent.answer.ids.tolist()
        assert prompt.token_ids().tolist() == held[: len(held) - prompt.drop] + ids
        assert whole_ids[len(whole_ids) - len(ids) :] == ids
        # A stop token stays if it is what the text has at that place, and else gives way; others are not touched.
        end = int(parent.answer.ids[-1])
        place = len(whole_ids) - len(ids) - 1
        assert prompt.drop == int(parent.answer.stopped and (place < 0 or whole_ids[place] != end))
        assert not prompt.drop or end in openers or not made.family.stops

    @settings(max_examples=30, deadline=None)
    @given(plan=steps(name), seed=st.integers(0, 1 << 30))
    def run(plan: list[tuple[list[str], str]], seed: int) -> None:
        play(made, plan, seed, judge)

    run()


def test_the_table_in_the_docs_is_the_code() -> None:
    page = (ROOT_DIR / "docs" / "templates.md").read_text(encoding="utf-8")
    assert families_table.table() in page


def test_flags_in_the_docs_exist(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT_DIR / "docs" / "templates.md").read_text(encoding="utf-8")
    assert verify_command(["--help"]) == 0
    known = capsys.readouterr().out
    lines = [line.split("#")[0] for line in page.splitlines() if line.startswith("pacenote verify-template")]
    assert lines
    for flag in re.findall(r"--[a-z]+", " ".join(lines)):
        assert flag in known


def test_orders_that_are_well_formed() -> None:
    assert well_formed("plain", ["user", "system"])
    assert not well_formed("plain", ["tool"])
    assert well_formed("call", ["tool", "user"])
    assert well_formed("call", ["user"])
    assert not well_formed("call", ["user", "tool"])
    assert not well_formed("two calls", ["tool"])
    assert well_formed("two calls", ["tool", "tool"])
