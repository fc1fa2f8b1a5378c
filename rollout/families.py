"""Families of chat templates: what is fixed so that history only grows, what ends a turn, what becomes of thinking.

A family describes published templates. What the template at hand does is measured when it is loaded (`Template`), shown
by `pacenote verify-template`, and proven again on every request (`tito`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

KEPT = "kept"
UNTIL_ANSWERED = "kept while tools are called"
STRIPPED = "stripped"
"""What a template does with the thinking of earlier turns. `UNTIL_ANSWERED`: it is written back as long as only tools
have answered since, and taken out once the assistant has answered or a user speaks, which differs between families."""

KEEPING = {
    "clear_thinking": False,
    "drop_thinking": False,
    "preserve_thinking": True,
    "preserved_thinking": True,
    "truncate_history_thinking": False,
}
"""Arguments by which published templates keep the thinking of earlier turns."""

Plain = Mapping[str, Any]


def _as_it_is(message: Plain) -> Plain:
    return message


def _harmony(message: Plain) -> Plain:
    """Thinking under the name that gpt-oss's template reads; before a call it takes one text only, so both are one."""
    thought = message.get("reasoning_content")
    if not thought:
        return message
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    if message.get("tool_calls") and message.get("content"):
        return rest | {"thinking": f"{thought}\n{message['content']}", "content": ""}
    return rest | {"thinking": thought}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models whose chat templates behave alike.

    Attributes:
        name: as in `--family`.
        models: whose.
        markers: tokens that a vocabulary must hold for `auto` to choose this family; empty is never chosen.
        words: texts that the chat template must hold besides; families of one vocabulary differ by these.
        fixed: template arguments that clients may not change. A template that does not read one ignores it.
        stops: tokens that end an answer.
        thinking: what the published templates do with thinking under `fixed`: KEPT, UNTIL_ANSWERED or STRIPPED.
        remark: what else one should know; for docs and the verifier.
        appends: published templates only append for what they accept, so one that rewrites is refused at the start.
            Otherwise rewriting is expected, and a request that it hits is rendered in full as a new root.
        shape: from a message with `reasoning_content` and object arguments to the template's own names.
    """

    name: str
    models: str
    markers: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    thinking: str = KEPT
    remark: str = ""
    appends: bool = False
    shape: Callable[[Plain], Plain] = _as_it_is

    def fitted(self, chat_template: str) -> Family:
        """This family; without fixed arguments of its own, with those of `KEEPING` that the chat template mentions."""
        if self.markers:
            return self
        return replace(self, fixed={name: value for name, value in KEEPING.items() if name in chat_template})


_CHATML = frozenset({"<|im_start|>", "<|im_end|>", "<think>", "<tool_response>"})
_CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="glm47",
            models="GLM-4.5, 4.6, 4.7, 5",
            markers=frozenset({"[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"}),
            fixed={"clear_thinking": False},
            stops=("<|user|>", "<|observation|>", "<|endoftext|>"),
            remark="Templates of 4.5 and 4.6 do not read `clear_thinking`: thinking goes when a user speaks.",
            appends=True,
        ),
        Family(
            name="qwen35",
            models="Qwen3.5, 3.6, 3.8",
            markers=_CHATML,
            words=("<function=", "<think>"),
            fixed={"preserve_thinking": True},
            stops=_CHATML_STOPS,
            remark="Read since 3.6; the template of 3.5 takes thinking out when a user speaks. A system message may "
            "only come first.",
        ),
        Family(
            name="qwen3",
            models="Qwen3",
            markers=_CHATML,
            words=("<tool_call>", "<think>", "enable_thinking"),
            fixed={"clear_thinking": False, "preserve_thinking": True},
            stops=_CHATML_STOPS,
            thinking=UNTIL_ANSWERED,
            remark="The published template reads neither argument; templates made for training do. An answer without "
            "thinking is rewritten as soon as anything follows it.",
        ),
        Family(
            name="qwennext",
            models="Qwen3-Next, Qwen3-2507",
            markers=_CHATML,
            words=("<tool_call>", "<think>"),
            fixed={"clear_thinking": False, "preserve_thinking": True},
            stops=_CHATML_STOPS,
            thinking=UNTIL_ANSWERED,
            remark="As qwen3, without `enable_thinking`: the prompt always opens the thinking.",
        ),
        Family(
            name="deepseek32",
            models="DeepSeek V3 to V4, R1",
            markers=frozenset({"<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"}),
            fixed={"drop_thinking": False},
            stops=("<｜end▁of▁sentence｜>",),
            remark="V3.2 comes without a template: bring one; `drop_thinking` is the argument of its published "
            "encoder, and of V4. V3 and V3.1 never write thinking back, and gather system messages at the top.",
        ),
        Family(
            name="kimi_k2",
            models="Kimi K2, K2-Thinking, K2.5, K2.6",
            markers=frozenset({"<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>"}),
            fixed={"preserve_thinking": True},
            stops=("<|im_end|>",),
            remark="Read since K2.6. Before, thinking goes once an answer calls no tool.",
        ),
        Family(
            name="minimax",
            models="MiniMax M2 to M3",
            markers=frozenset({"]~!b[", "]~b]", "[e~["}),
            fixed={"clear_thinking": False},
            stops=("[e~[",),
            thinking=UNTIL_ANSWERED,
            remark="No published template reads the argument; templates made for training do, and M3 keeps thinking by "
            "itself. A system message that does not come first is left out.",
        ),
        Family(
            name="gpt_oss",
            models="gpt-oss (harmony)",
            markers=frozenset({"<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<|end|>"}),
            stops=("<|return|>", "<|call|>"),
            thinking=UNTIL_ANSWERED,
            remark="The prompt holds `reasoning_effort` and the date, so a change of either starts a new root. It "
            "leaves out a system message that does not come first.",
            shape=_harmony,
        ),
        Family(
            name="default",
            models="any other chat template",
            remark="Fixes those of the arguments above, `preserved_thinking=True` and "
            "`truncate_history_thinking=False` that the template mentions. Refused if it rewrites all the same.",
            appends=True,
        ),
    )
}


def detect_family(vocabulary: Collection[str], chat_template: str = "") -> Family:
    """The first family whose markers the vocabulary holds and whose words the chat template holds, else `default`."""
    for family in FAMILIES.values():
        known = bool(family.markers) and all(marker in vocabulary for marker in family.markers)
        if known and all(word in chat_template for word in family.words):
            return family
    return FAMILIES["default"]
