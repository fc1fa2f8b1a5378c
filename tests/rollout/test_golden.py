"""The embedded engine's answers are SGLang's, field by field: names, types and, on the same weights, numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pacenote.rollout.launch import Service, engine_command, free_port
from pacenote.rollout.sglang import CLIENT_FIELDS
from tests.rollout.golden import DIFFERENCES, FOLDER, differences, load
from tests.rollout.golden_calls import CONTEXT, KINDS, Answers, answers_of, weights_digest

CLIENT_VALUES: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 3, "max_completion_tokens": 3,
    "min_tokens": 1, "stop": ["x"], "stop_token_ids": [3], "ignore_eos": True, "seed": 1, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"3": 1.0}, "top_logprobs": 2,
    "response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": True,
    "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
"""A value for each field of a client's request that reaches the engine."""


@pytest.fixture(scope="module")
def engine(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The embedded engine, started as the one that was recorded."""
    port = free_port()
    command = engine_command(
        tiny_dir, port=port, dtype="float32", context_length=CONTEXT, served_model_name="tiny", weight_version="0",
        max_running_requests=8, extra=["--reasoning-parser", "glm45"],
    )  # fmt: skip
    log = tmp_path_factory.mktemp("golden") / "engine.log"
    with Service("engine", command, url=f"http://127.0.0.1:{port}", log=log) as service:
        service.wait_healthy(120)
        yield service


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """One kind of calls after the other."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def answers(kind: str, engine: Service, tiny_dir: Path) -> Answers:
    """The embedded engine's answers."""
    return answers_of(kind, engine.url, tiny_dir)


def test_the_weights_are_those_that_were_recorded(tiny_dir: Path) -> None:
    recorded = json.loads((FOLDER / "recorded.json").read_text())
    assert recorded["weights"] == weights_digest(tiny_dir), "build_tiny changed: make test-sglang ARGS=--record"


def test_every_answer_is_sglangs(kind: str, answers: Answers) -> None:
    """But for the differences that are meant; and a meant one that is no longer there leaves the list."""
    meant = DIFFERENCES[kind]
    lines = list(differences(load(kind), answers))
    unexplained = [line for line in lines if not any(re.search(pattern, line) for pattern in meant)]
    assert not unexplained, "\n".join(unexplained)
    stale = [pattern for pattern in meant if not any(re.search(pattern, line) for line in lines)]
    assert not stale, stale


def test_answers_parse_as_sglangs_own_classes(kind: str, answers: Answers) -> None:
    """With no field that these do not know."""
    parsed = parse([answer["body"] for answer in answers.values() if answer["type"] == "application/json"], [])
    wanted = {"chat": {"ChatCompletionResponse", "ErrorResponse"}, "info": {"ModelList"}}
    assert set(parsed) >= wanted.get(kind, set())


def test_sglangs_classes_know_all_that_a_session_sends() -> None:
    assert set(CLIENT_VALUES) == set(CLIENT_FIELDS)
    ours = {
        "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "input_ids": [1], "stream": False,
        "logprobs": True, "return_meta_info": True, "no_stop_trim": False, "return_routed_experts": True,
        "routed_experts_start_len": 0,
    }  # fmt: skip
    assert parse([], [ours | CLIENT_VALUES]) == {"ChatCompletionRequest": 1}


def parse(answers: list[Any], requests: list[Any]) -> dict[str, int]:
    """How many bodies each of SGLang's classes read; asserts that none was refused and no field dropped."""
    folder = Path(sys.prefix) / "sglang"
    if not folder.is_dir():
        pytest.skip("SGLang's protocol is not installed")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("protocol_classes.py")), str(folder)],
        input=json.dumps({"answers": answers, "requests": requests}),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts, *wrong = done.stdout.splitlines()
    assert not wrong, "\n".join(wrong)
    parsed: dict[str, int] = json.loads(counts)
    return parsed


def test_a_comparison_sees() -> None:
    """Names, types, numbers and rows: each change of a recorded answer is one difference."""
    kept = load("chat")["normal"]
    meta = ("choices", 0, "meta_info")
    rows = kept["body"]["choices"][0]["meta_info"]["routed_experts"]
    changes: list[tuple[tuple[Any, ...], Any]] = [
        ((*meta, "completion_tokens"), 5),
        ((*meta, "completion_tokens"), 4.0),
        ((*meta, "finish_reason", "type"), "stop"),
        ((*meta, "surprise"), None),
        ((*meta, "routed_experts"), rows[16:]),
        ((*meta, "routed_experts"), rows[16:] + rows[:16]),
        ((*meta, "output_token_logprobs", 0, 0), -1.0),
        (("model",), None),
    ]
    for path, value in changes:
        changed = json.loads(json.dumps(kept))
        inner = changed["body"]
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        assert len(list(differences({"normal": kept}, {"normal": changed}))) >= 1, path
    assert not list(differences({"normal": kept}, {"normal": kept}))
