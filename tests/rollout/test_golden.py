"""The embedded engine's answers are SGLang's, field by field: names, types and, on the same weights, numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pacenote.rollout.launch import Service, engine_command, free_port
from tests.rollout.golden import DIFFERENCES, FOLDER, differences, load
from tests.rollout.golden_calls import CALLS, CONTEXT, Caller, weights_digest


@pytest.fixture(scope="module")
def engine(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The embedded engine, started as the one that was recorded."""
    port = free_port()
    command = engine_command(
        tiny_dir, port=port, dtype="float32", context_length=CONTEXT, served_model_name="tiny", weight_version="0",
        max_running_requests=8, extra=["--reasoning-parser", "glm45"],
    )  # fmt: skip
    log = tmp_path_factory.mktemp("golden") / "engine.log"
    with (
        Service("engine", command, url=f"http://127.0.0.1:{port}", log=log) as service,
        httpx.Client(base_url=service.url, timeout=60, trust_env=False) as http,
    ):
        service.wait_healthy(120)
        yield http


@pytest.fixture(scope="module")
def found(engine: httpx.Client, tiny_dir: Path) -> list[str]:
    """All differences, over all kinds of calls in order."""
    lines = []
    for kind, ask in CALLS.items():
        call = Caller(engine, tiny_dir)
        ask(call)
        lines += differences(kind, load(kind), call.answers)
    return lines


def test_the_weights_are_those_that_were_recorded(tiny_dir: Path) -> None:
    recorded = json.loads((FOLDER / "recorded.json").read_text())
    assert recorded["weights"] == weights_digest(tiny_dir), "build_tiny changed: make test-sglang ARGS=--record"


def test_every_answer_is_sglangs(found: list[str]) -> None:
    unexplained = [line for line in found if not any(re.search(pattern, line) for pattern in DIFFERENCES)]
    assert not unexplained, "\n".join(unexplained)


def test_every_explained_difference_is_one(found: list[str]) -> None:
    """What no longer differs leaves the list."""
    stale = [pattern for pattern in DIFFERENCES if not any(re.search(pattern, line) for line in found)]
    assert not stale, stale


def test_a_comparison_sees() -> None:
    """Names, types, numbers and rows: each change of a recorded answer is one difference."""
    kept = load("chat")["normal"]
    meta = ("choices", 0, "meta_info")
    changes = [
        ((*meta, "completion_tokens"), 5), ((*meta, "completion_tokens"), 4.0), ((*meta, "finish_reason", "type"), "stop"),
        ((*meta, "surprise"), None), ((*meta, "routed_experts"), kept["body"]["choices"][0]["meta_info"]["routed_experts"][16:]),
        (("model",), None), ((*meta, "output_token_logprobs", 0, 0), -1.0),
    ]  # fmt: skip
    for path, value in changes:
        changed = json.loads(json.dumps(kept))
        inner = changed["body"]
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        assert len(list(differences("chat", {"normal": kept}, {"normal": changed}))) >= 1, path
    assert not list(differences("chat", {"normal": kept}, {"normal": kept}))
