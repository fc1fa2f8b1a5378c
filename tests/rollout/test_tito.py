"""Which tokens a request appends: boundaries, proofs, roles, spans."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pacenote.rollout.errors import RoleNotAllowed
from pacenote.rollout.messages import parse_messages
from pacenote.rollout.template import FAMILIES, Template, detect_family
from pacenote.rollout.tito import check_roles
from pacenote.rollout.turn import Prompt
from tests.rollout import tokenizers

if TYPE_CHECKING:
    from tests.rollout.conftest import Player

Message = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
BARE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
OPENER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
REWRITES_ANSWERS = BARE.replace("{{ m.content", "{{ '...' if m.role == 'assistant' and not loop.last else m.content")
REWRITES_PROMPTS = BARE.replace("m.content }}", "m.content }}{{ '!' if loop.last and m.role == 'user' }}")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def tool(text: str) -> Message:
    return {"role": "tool", "content": text}


def text(player: Player, prompt: Prompt) -> str:
    decoded: str = player.template._tokenizer.decode(prompt.ids)
    return decoded


@pytest.mark.parametrize(
    ("stop", "after", "kept", "appended"),
    [
        ("user", user("b"), 1, "b<|assistant|><think>"),  # the stop token is the next opener already
        ("observation", tool("b"), 1, "<tool_response>b</tool_response><|assistant|><think>"),
        ("user", tool("b"), 0, "<|observation|><tool_response>b</tool_response><|assistant|><think>"),
        ("observation", user("b"), 0, "<|user|>b<|assistant|><think>"),
        ("end", user("b"), 0, "<|user|>b<|assistant|><think>"),
        (None, user("b"), 0, "<|user|>b<|assistant|><think>"),  # ended by length: nothing gives way
        ("text", user("b"), 0, "<|user|>b<|assistant|><think>"),  # ended by a stop text: likewise
    ],
)
def test_boundaries_of_glm(player: Player, stop: str | None, after: Message, kept: int, appended: str) -> None:
    answer = player.ask([user("a")], [40, 41], stop=stop)
    player.ask([user("a"), answer, after])
    prompt = player.turn.prompt
    assert prompt.parent is player.session.turns[0]
    assert prompt.drop == (1 if stop not in (None, "text") and not kept else 0)
    assert text(player, prompt) == appended
    ids = player.sent[0].sampled
    held = player.sent[0].body["input_ids"] + (ids[:-1] if prompt.drop else ids)
    assert player.sent[1].body["input_ids"] == held + prompt.ids.tolist()
    player.check()


@pytest.mark.parametrize(
    ("stop", "drop", "appended"),
    [
        ("<|im_end|>", 0, "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"),
        ("end", 1, "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"),
        (None, 0, "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_boundaries_of_chatml(chatml_player: Player, stop: str | None, drop: int, appended: str) -> None:
    player = chatml_player
    answer = player.ask([user("a")], [40, 41], stop=stop)
    player.ask([user("a"), answer, user("b")], stop="<|im_end|>")
    assert player.turn.prompt.drop == drop
    assert text(player, player.turn.prompt) == appended
    player.check()
    [trajectory] = player.session.trajectories()
    closing = player.token("<|im_end|>")
    trained = trajectory.tokens[trajectory.loss_mask == 1].tolist()
    assert trained == [40, 41] + ([closing] if stop == "<|im_end|>" else []) + [40, 41, closing]


CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING: Message = {"content": "ok", "tool_calls": [CALL]}
SPOKEN: Message = {"content": "ok"}


@pytest.mark.parametrize(
    ("name", "stop", "message", "after", "kept", "appended"),
    [
        (
            "qwen35",
            "<|im_end|>",
            CALLING,
            tool("b"),
            1,
            "\n<|im_start|>user\n<tool_response>\nb\n</tool_response><|im_end|>",
        ),
        ("qwen35", "<|endoftext|>", SPOKEN, user("b"), 0, "<|im_end|>\n<|im_start|>user\nb<|im_end|>"),
        ("deepseek32", "<｜end▁of▁sentence｜>", SPOKEN, user("b"), 1, "<｜User｜>b<｜Assistant｜><think>"),
        ("deepseek32", None, SPOKEN, user("b"), 0, "<｜end▁of▁sentence｜><｜User｜>b<｜Assistant｜><think>"),
        ("deepseek32", "<｜end▁of▁sentence｜>", CALLING, tool("b"), 1, "\n\n<function_results>\n<result>b</result>"),
        ("kimi_k2", "<|im_end|>", SPOKEN, user("b"), 1, "<|im_user|>user<|im_middle|>b<|im_end|>"),
        ("kimi_k2", "[EOS]", SPOKEN, user("b"), 0, "<|im_end|><|im_user|>user<|im_middle|>b<|im_end|>"),
        ("kimi_k2", None, CALLING, tool("b"), 0, "<|im_end|><|im_system|>tool<|im_middle|>## Return of call00000\nb"),
        ("minimax", "[e~[", SPOKEN, user("b"), 1, "\n]~b]user\nb[e~[\n]~b]ai"),
        ("minimax", None, CALLING, tool("b"), 0, "[e~[\n]~b]tool\n<response>b</response>[e~["),
        ("gpt_oss", "<|return|>", SPOKEN, user("b"), 0, "<|end|><|start|>user<|message|>b<|end|><|start|>assistant"),
        (
            "gpt_oss",
            "<|call|>",
            CALLING,
            tool("b"),
            1,
            "<|start|>functions.f to=assistant<|channel|>commentary<|message|>",
        ),
        ("gpt_oss", "<|return|>", CALLING, tool("b"), 0, "<|call|><|start|>functions.f to=assistant"),
        ("gpt_oss", None, SPOKEN, user("b"), 0, "<|end|><|start|>user<|message|>b<|end|>"),
    ],
)
def test_boundaries_of_families(
    new_player: Callable[..., Player],
    name: str,
    stop: str | None,
    message: Message,
    after: Message,
    kept: int,
    appended: str,
) -> None:
    """A stop token is kept once, or gives way to what the format has there; a cut answer gets the whole closing."""
    tokenizer = tokenizers.tokenizer(name)
    player = new_player(Template(tokenizer, detect_family(tokenizer.get_vocab(), tokenizers.source(name))))
    after = after | ({"tool_call_id": "call00000"} if after["role"] == "tool" else {})
    answer = player.ask([user("a")], [40, 41], stop=stop, message=message)
    player.ask([user("a"), answer, after])
    prompt = player.turn.prompt
    assert prompt.parent is player.session.turns[0], prompt.note
    assert prompt.drop == (0 if kept or stop is None else 1)
    assert text(player, prompt).startswith(appended)
    player.check()


def test_an_answer_cut_within_its_closing_is_closed_once(chatml_player: Player) -> None:
    """The budget ended on ChatML's closing token: the line break alone is missing."""
    player = chatml_player
    answer = player.ask([user("a")], [40, player.token("<|im_end|>")])
    player.ask([user("a"), answer, user("b")])
    assert player.turn.prompt.drop == 0
    assert text(player, player.turn.prompt).startswith("\n<|im_start|>user\nb")
    player.check()


def test_thinking_that_a_template_strips_starts_a_new_root(new_player: Callable[..., Player]) -> None:
    """The history of an answered turn is what the template makes of it, and the record says so."""
    player = new_player(Template(tokenizers.tokenizer("deepseek31"), FAMILIES["deepseek32"]))
    stop = "<｜end▁of▁sentence｜>"
    player.ask([user("a")], [40], stop=stop)
    answer = player.ask([user("a")], [40, 41], stop=stop, message={"content": "ok", "reasoning_content": "hm"})
    player.ask([user("a"), answer, user("b")], [42], stop=stop)
    prompt = player.turn.prompt
    assert prompt.parent is None
    assert prompt.note == "the template leaves the thinking of an answered turn out of history"
    assert text(player, prompt) == (
        "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜></think>ok<｜end▁of▁sentence｜><｜User｜>b<｜Assistant｜></think>"
    )
    player.check()


def test_another_effort_starts_a_new_root_where_the_prompt_holds_it(new_player: Callable[..., Player]) -> None:
    player = new_player(Template(tokenizers.tokenizer("gpt_oss"), FAMILIES["gpt_oss"]))
    asked = [user("a")]
    answer = player.ask(asked, [40], stop="<|return|>", request={"reasoning_effort": "low"})
    player.ask([*asked, answer, user("b")], [41], stop="<|return|>", request={"reasoning_effort": "low"})
    player.ask([*asked, answer, user("c")], [42], request={"reasoning_effort": "high"})
    _, low, high = player.session.turns
    assert low.parent is player.session.turns[0]
    assert high.parent is None
    assert "its arguments or the tools rewrite history" in (high.prompt.note or "")
    player.check()


def test_a_budget_that_ends_on_a_stop_token_is_no_stop(player: Player) -> None:
    """An answer that ended by length keeps its last token, whatever it is: nobody took it as a stop."""
    answer = player.ask([user("a")], [40, player.token("<|observation|>")])
    player.ask([user("a"), answer, user("b")])
    assert player.turn.prompt.drop == 0
    assert text(player, player.turn.prompt) == "<|user|>b<|assistant|><think>"
    player.check()


def test_stored_spelling_wins(player: Player) -> None:
    """Tokens that the tokenizer would not choose, for a text that was parsed in its own way, stay as sampled."""
    letters = [player.token(letter) for letter in "more"]
    assert player.template.encode("more")[0] != letters
    answer = player.ask([user("a")], letters, stop="user", text=" more\n")
    player.ask([user("a"), answer, user("b")])
    assert player.sent[1].body["input_ids"][: len(letters) + 6] == player.sent[0].body["input_ids"] + letters
    player.check()


def test_consecutive_tool_messages_share_one_opener(player: Player) -> None:
    answer = player.ask([user("a")], [40], stop="observation")
    player.ask([user("a"), answer, tool("x"), tool("y"), user("z")])
    assert text(player, player.turn.prompt) == (
        "<tool_response>x</tool_response><tool_response>y</tool_response><|user|>z<|assistant|><think>"
    )
    [trajectory] = player.session.trajectories()
    decode = player.template._tokenizer.decode
    spoken = decode(40) + "<|observation|>"  # the sampled opener belongs to the answer
    assert [(role, decode(trajectory.tokens[start:stop])) for role, start, stop, _ in trajectory.spans] == [
        ("user", "[gMASK]<sop><|user|>a"),
        ("assistant", "<|assistant|><think>" + spoken),
        ("tool", "<tool_response>x</tool_response>"),
        ("tool", "<tool_response>y</tool_response>"),
        ("user", "<|user|>z"),
        ("assistant", "<|assistant|><think>" + decode([40, 41])),
    ]
    player.check()


def test_another_answer_after_the_answer(player: Player) -> None:
    answer = player.ask([user("a")], [40], stop="user")
    player.ask([user("a"), answer])
    assert player.turn.prompt.appended == ()
    assert player.turn.prompt.drop == 1
    assert text(player, player.turn.prompt) == "<|assistant|><think>"
    player.check()


def test_the_thinking_switch_may_change_between_turns(player: Player) -> None:
    answer = player.ask([user("a")], [40], stop="user")
    player.ask(
        [user("a"), answer, user("b")], stop="user", request={"chat_template_kwargs": {"enable_thinking": False}}
    )
    assert player.turn.prompt.parent is player.session.turns[0]
    assert text(player, player.turn.prompt) == "b<|assistant|></think>"
    player.check()


def test_tools_that_change_start_a_new_root_that_says_so(player: Player) -> None:
    answer = player.ask([user("a")], [40], stop="user", request={"tools": TOOLS})
    assert player.sent[0].body["tools"] == TOOLS
    player.ask([user("a"), answer, user("b")], request={"tools": TOOLS})
    assert player.turn.prompt.parent is player.session.turns[0]
    player.ask([user("a"), answer, user("c")])
    prompt = player.turn.prompt
    assert prompt.parent is None
    assert prompt.note is not None
    assert "the tools rewrite history: at character" in prompt.note
    assert text(player, prompt).startswith("[gMASK]<sop><|user|>a<|assistant|></think>ok<|user|>c")
    assert player.turn.generated() == [False, False, False, True]
    assert player.session.records()[2]["note"] == prompt.note
    player.check()


@pytest.mark.parametrize(
    ("chat_template", "note"),
    [
        (REWRITES_ANSWERS, r"rewrite history: at character \d+ 'ok' became '\.\.\.<\|user\|>b"),
        (REWRITES_PROMPTS, "the template rewrites a prompt once it is answered"),
    ],
)
def test_templates_that_rewrite_get_new_roots(
    tiny_dir: Path, new_player: Callable[..., Player], chat_template: str, note: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.chat_template = chat_template + OPENER
    player = new_player(Template(tokenizer, FAMILIES["default"]))
    answer = player.ask([user("a")], [40, 41])
    player.ask([user("a"), answer, user("b")], [42])
    prompt = player.turn.prompt
    assert prompt.parent is None
    assert re.search(note, prompt.note or "")
    whole = player.template.render(
        parse_messages([user("a"), answer, user("b")]), tools=None, arguments={}, generation=True
    )
    assert prompt.ids.tolist() == player.template.encode(whole)[0]
    first, second = player.session.trajectories()
    assert first.tokens[first.loss_mask == 1].tolist() == [40, 41]
    assert second.tokens[second.loss_mask == 1].tolist() == [42]
    player.check()


def test_a_note_is_only_for_what_was_known(player: Player) -> None:
    player.ask([user("a")])
    player.ask([user("b")])
    player.ask([user("a"), {"role": "assistant", "content": "nobody said this"}, user("b")])
    assert [turn.prompt.note for turn in player.session.turns] == [None, None, None]
    assert [turn.parent for turn in player.session.turns] == [None, None, None]


def test_roles_that_may_not_be_appended() -> None:
    messages = parse_messages([user("a"), {"role": "assistant"}, tool("x"), user("b"), {"role": "system"}])
    check_roles(messages, 2, {"tool", "user", "system"})
    check_roles(messages, 5, set())
    check_roles(messages[:3], 2, {"tool"})
    with pytest.raises(RoleNotAllowed) as caught:
        check_roles(messages, 2, {"tool", "system"})
    assert str(caught.value) == (
        "messages[3] has role 'user', but only system, tool may be appended to this session's history: start the "
        "session server with --tito-allowed-append-roles to allow more"
    )
    assert (caught.value.param, caught.value.code, caught.value.status) == ("messages[3].role", "role_not_allowed", 400)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.text(st.sampled_from("ab é\n<|>\u4e2d"), max_size=6), min_size=1, max_size=4),
    roles=st.lists(st.sampled_from(["user", "tool", "system", "assistant"]), min_size=4, max_size=4),
    stop=st.sampled_from([None, "user", "observation", "end"]),
)
def test_spans_hold_their_own_words(
    new_player: Callable[..., Player], words: list[str], roles: list[str], stop: str | None
) -> None:
    """Every message's text stands in its own span, of a root as of a suffix."""
    player = new_player()
    told = [{"role": role, "content": f"({word})"} for role, word in zip(roles, words, strict=False)]
    answer = player.ask([user("(q)"), *told], [70], stop=stop)
    player.ask([user("(q)"), *told, answer, *told], [71])
    assert player.turn.parent is player.session.turns[0]
    [newest] = player.session.trajectories()
    player.close()
    contents = ["(q)", *(message["content"] for message in told), None, *(message["content"] for message in told), None]
    for content, (role, start, stop_, generated) in zip(contents, newest.spans, strict=True):
        piece = player.template._tokenizer.decode(newest.tokens[start:stop_])
        assert (role == "assistant") if generated else content in piece
        assert generated == (content is None)
        assert content is None or piece.count("(") == 1


def test_prompt_lengths_add_up(player: Player) -> None:
    history: list[Message] = []
    for number, stop in enumerate(("user", "observation", None, "end")):
        history += [user(f"q{number}")]
        history += [player.ask(history, [40 + number], stop=stop)]
    for turn in player.session.turns:
        assert turn.prompt.length == len(turn.prompt.token_ids()) == len(player.sent[turn.number].body["input_ids"])
        assert sum(tokens for _, tokens in turn.prompt.spans) == len(turn.prompt.ids)
        assert turn.line()[-1] is turn
    assert [turn.number for turn in player.turn.line()] == [0, 1, 2, 3]
    player.check()
