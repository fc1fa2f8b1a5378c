"""Real SGLang answers as it was recorded for the embedded engine's tests; `--record` records it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.golden import FOLDER, differences, load
from tests.rollout.golden_calls import CONTEXT, KINDS, Answers, answers_of, weights_digest
from tests.sglang.conftest import START_SECONDS, Start

INFO = {"model_path", "tokenizer_path", "served_model_name", "host", "port", "dtype", "device", "random_seed",
        "context_length", "max_running_requests", "max_prefill_tokens", "max_total_num_tokens", "tool_call_parser",
        "reasoning_parser", "weight_version", "enable_return_routed_experts", "disaggregation_mode",
        "disaggregation_bootstrap_port", "tp_size",
        "dp_size", "pp_size", "version", "status"}  # fmt: skip
"""What gateways and pools read of /server_info, whose five hundred fields are SGLang's own options."""


@pytest.fixture(scope="module")
def asked(glm: Path, start: Start) -> dict[str, Answers]:
    """SGLang's answers to all calls, freed of what is this machine's."""
    service = start(
        glm, dtype="float32", context_length=CONTEXT, served_model_name="tiny", weight_version="0",
        max_running_requests=8, extra=["--reasoning-parser", "glm45"],
    )  # fmt: skip
    service.wait_healthy(START_SECONDS)
    kinds = {kind: clean(answers_of(kind, service.url, glm), glm) for kind in KINDS}
    assert service.alive, service.tail()
    return kinds


def clean(value: Any, model: Path, name: str = "") -> Any:
    """Paths of this machine, and what validation quotes of SGLang's sources, replaced."""
    if isinstance(value, dict):
        kept = INFO if "disaggregation_ib_device" in value else value.keys()
        return {key: clean(inner, model, key) for key, inner in value.items() if key in kept}
    if isinstance(value, list):
        return [clean(inner, model) for inner in value]
    if isinstance(value, str):
        value = value.replace(str(model), "/model")
        return value.partition("\n")[0] if name == "message" else value
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_recorded_ones(
    asked: dict[str, Answers], kind: str, glm: Path, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--record"):
        FOLDER.mkdir(exist_ok=True)
        text = json.dumps(asked[kind], indent=1, ensure_ascii=True)
        (FOLDER / f"{kind}.json").write_text(text + "\n", encoding="utf-8")
        about = {"sglang": asked["info"]["/server_info"]["body"]["version"], "weights": weights_digest(glm)}
        (FOLDER / "recorded.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    # timings, which are other ones each time
    moved = [line for line in differences(load(kind), asked[kind]) if not re.search(r"/v1/loads|engine_load", line)]
    assert not moved, "\n".join(moved)
