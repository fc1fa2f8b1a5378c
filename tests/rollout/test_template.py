"""Chat templates of real tokenizers: families, what is proven at the start, what is fixed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from pacenote.rollout.errors import BadRequest, StartupError
from pacenote.rollout.families import KEPT
from pacenote.rollout.messages import ROLES, parse_messages
from pacenote.rollout.template import FAMILIES, Template, TemplateError, detect_family, first_difference

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM_LATER = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes\n first') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COUNTS = "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
LAST_ONLY = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_template() -> Template:
    made = ByT5Tokenizer()
    made.chat_template = CHATML
    return Template(made, FAMILIES["default"])


def tokenizer(model: Path, chat_template: str | None = None) -> Any:
    made = AutoTokenizer.from_pretrained(model)
    if chat_template is not None:
        made.chat_template = chat_template
    return made


def render(template: Template, *messages: dict[str, Any], generation: bool = False, **arguments: Any) -> str:
    return template.render(
        parse_messages([*messages]), tools=None, arguments=template.arguments(arguments), generation=generation
    )


def test_the_tiny_model_is_glm(template: Template) -> None:
    assert template.family is FAMILIES["glm47"]
    assert template.closing == ""
    assert template.header(template.arguments(None)) == "<|assistant|><think>"
    assert template.header(template.arguments({"enable_thinking": False})) == "<|assistant|></think>"
    assert (
        render(
            template,
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yo", "reasoning_content": "t"},
            {"role": "user", "content": "more"},
            generation=True,
        )
        == "[gMASK]<sop><|user|>hi<|assistant|><think>t</think>yo<|user|>more<|assistant|><think>"
    )


def test_a_family_is_told_by_its_tokens() -> None:
    glm = FAMILIES["glm47"].markers
    assert detect_family(glm | {"x"}).name == "glm47"
    assert detect_family(glm - {"<sop>"}).name == "default"
    assert detect_family(set()).name == "default"


def test_closing_of_chatml(tiny_dir: Path) -> None:
    template = Template(tokenizer(tiny_dir, CHATML), FAMILIES["default"], append_roles=ROLES)
    assert template.closing == "<|im_end|>\n"
    assert template.header({}) == "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("chat_template", "roles", "text"),
    [
        (NO_SYSTEM_LATER, ROLES, r"allows an appended system message.*system comes first; leave system out of --tito"),
        (COUNTS, ["tool"], r"only appends when a tool message follows.*at character 0 '2.*' became '3"),
        (
            LAST_ONLY,
            ["user"],
            r"when a user message follows an answer \(family default\).*'answer' became",
        ),
        (
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            [],
            "writes the assistant's content, got one that",
        ),
        ("{{ raise_exception('no') }}", [], "renders user and assistant: the chat template refused the messages: no"),
        ("{% for %}", [], "renders user and assistant"),
    ],
)
def test_templates_that_do_not_fit_are_refused_at_the_start(
    tiny_dir: Path, chat_template: str, roles: Sequence[str], text: str
) -> None:
    with pytest.raises(StartupError, match=text) as caught:
        Template(tokenizer(tiny_dir, chat_template), FAMILIES["default"], append_roles=roles)
    assert "\n" not in str(caught.value)


def test_only_the_roles_in_use_are_proven(tiny_dir: Path) -> None:
    Template(tokenizer(tiny_dir, NO_SYSTEM_LATER), FAMILIES["default"], append_roles=["user", "tool"])


def test_without_its_fixed_arguments_glm_rewrites_thoughts(tiny_dir: Path) -> None:
    """Why `clear_thinking` is fixed: the template takes thoughts out of earlier turns once a user speaks again."""
    loose = Template(tokenizer(tiny_dir), replace(FAMILIES["glm47"], fixed={}))
    question: dict[str, Any] = {"role": "user", "content": "q"}
    thought: dict[str, Any] = {"role": "assistant", "content": "a", "reasoning_content": "t"}
    old, new = render(loose, question, thought), render(loose, question, thought, question)
    assert first_difference(old, new) == "at character 35 'think>t</think>a' became '/think>a<|user|>q'"


def test_any_other_template_keeps_thinking_if_it_can_be_told_to(tiny_dir: Path) -> None:
    """`default` fixes the known arguments that the template mentions."""
    template = Template(tokenizer(tiny_dir), FAMILIES["default"], append_roles=ROLES)
    assert template.arguments(None) == {"clear_thinking": False}
    assert template.thinking == KEPT
    assert Template(tokenizer(tiny_dir, CHATML), FAMILIES["default"]).arguments(None) == {}


def test_models_that_are_not_there(tmp_path: Path, tiny_dir: Path) -> None:
    with pytest.raises(StartupError, match="no such directory"):
        Template.load(str(tmp_path / "none"))
    with pytest.raises(StartupError, match="no such directory"):
        Template.load("notthere")
    with pytest.raises(StartupError, match="expected a model with a tokenizer, got someone/nothing") as caught:
        Template.load("someone/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(StartupError, match="expected a model with a tokenizer"):
        Template.load(str(tmp_path))
    with pytest.raises(StartupError, match=r"a family of auto, glm47, .*default, got 'qwen'"):
        Template.load(str(tiny_dir), family="qwen")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny_dir / name, tmp_path)
    with pytest.raises(StartupError, match=r"with a chat template, got one without: add chat_template\.jinja"):
        Template.load(str(tmp_path))


@pytest.mark.parametrize(
    ("requested", "text"),
    [
        ([], "must be an object, got list"),
        ("x", "must be an object, got str"),
        ({"tokenize": True}, r"chat_template_kwargs\.tokenize cannot be set"),
        ({"tools": []}, "cannot be set"),
        ({"messages": []}, "cannot be set"),
        ({"add_generation_prompt": False}, "cannot be set"),
        ({"bos_token": "x"}, "cannot be set"),
        ({"clear_thinking": True}, r"clear_thinking is False in family glm47.*got True: leave it out"),
    ],
)
def test_arguments_that_clients_may_not_set(template: Template, requested: object, text: str) -> None:
    with pytest.raises(BadRequest, match=text) as caught:
        template.arguments(requested)
    assert caught.value.param == "chat_template_kwargs"


def test_arguments_of_a_request(template: Template) -> None:
    assert template.arguments(None) == {"clear_thinking": False}
    assert template.arguments({"enable_thinking": False, "clear_thinking": False}, "low") == {
        "reasoning_effort": "low",
        "enable_thinking": False,
        "clear_thinking": False,
    }


def test_a_template_that_raises_is_a_bad_request(tiny_dir: Path) -> None:
    template = Template(tokenizer(tiny_dir, NO_SYSTEM_LATER), FAMILIES["default"])
    with pytest.raises(TemplateError, match="refused the messages: system comes first") as caught:
        render(template, {"role": "user"}, {"role": "system"})
    assert (caught.value.status, caught.value.code) == (400, "template_error")


def test_the_header_memory_is_bounded(tiny_dir: Path) -> None:
    template = Template(tokenizer(tiny_dir), FAMILIES["glm47"])
    for number in range(600):
        assert template.header(template.arguments({"x": number})) == "<|assistant|><think>"
    assert len(template._headers) <= 257


def test_first_difference() -> None:
    assert first_difference("ab", "abc") is None
    assert first_difference("", "") is None
    assert first_difference("abc", "abx") == "at character 2 'c' became 'x'"
    assert first_difference("abc", "ab") == "at character 2 'c' became ''"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30) | st.lists(st.sampled_from(["<|user|>", "<think>", "é", "a b", "\n"])).map("".join))
def test_encoding_says_where_each_token_starts(template: Template, text: str) -> None:
    ids, starts = template.encode(text)
    assert len(ids) == len(starts)
    assert starts == sorted(starts)
    assert ids == template._tokenizer.encode(text, add_special_tokens=False)
    assert all(0 <= start <= len(text) for start in starts)
    bounds = [*starts, len(text)]
    if text.isascii():  # one token a piece, so the pieces are the tokens' own texts
        pieces = [text[a:b] for a, b in pairwise(bounds)]
        assert pieces == [template._tokenizer.decode([token]) for token in ids]


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\u00e9\u4e2d\U0001f642")))
def test_a_tokenizer_that_does_not_say_where_tokens_start(text: str) -> None:
    """Byte by byte, in plain Python: every byte of a character starts where the character does."""
    ids, starts = byte_template().encode(text)
    expected = [place for place, letter in enumerate(text) for _ in letter.encode()]
    assert (len(ids), starts) == (len(expected), expected)


def test_a_tokenizer_that_loses_text_tells_no_starts() -> None:
    assert set(byte_template().encode("a\ufffdb")[1]) == {0}


def test_threads_render_and_encode_alike(template: Template) -> None:
    barrier = threading.Barrier(4)

    def work(number: int) -> list[tuple[str, list[int]]]:
        barrier.wait()
        made = []
        for turn in range(20):
            text = render(template, {"role": "user", "content": f"{number} {turn}"}, generation=True, n=number)
            made.append((text, template.encode(text)[0]))
        return made

    jobs: Callable[[int], list[tuple[str, list[int]]]] = work
    with ThreadPoolExecutor(4) as pool:
        for number, made in enumerate(pool.map(jobs, range(4))):
            for turn, (text, ids) in enumerate(made):
                assert text == f"[gMASK]<sop><|user|>{number} {turn}<|assistant|><think>"
                assert ids == template.encode(text)[0]
