"""New weights for a running SGLang, and what each way of pausing does to logprobs and routes of the answers at hand.

Held against transformers with the old and with the new weights, so that it shows which of them a number came from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file

from pacenote.replay.record import DECODE, PREFILL, RECOMPUTED
from pacenote.rollout.launch import Service, free_port, sessions_command
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer.errors import StaleWeights
from pacenote.trainer.model import build_tiny
from pacenote.trainer.sync import SyncConfig, Weights, WeightSync
from tests.rollout.golden_calls import PROMPT
from tests.rollout.talk import USER, chat, samples
from tests.rollout.talk import start as open_session
from tests.sglang.conftest import START_SECONDS, Start
from tests.sglang.test_sessions import running, wait
from tests.sglang.truth import Truth, same_logprobs, same_routes

FIELDS = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 120}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    return build_tiny(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def engine(glm: Path, start: Start) -> Service:
    service = start(glm, dtype="float32", weight_version="0", max_running_requests=8, context_length=512)
    service.wait_healthy(START_SECONDS)
    return service


@pytest.fixture(scope="module")
def sessions(engine: Service, glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port = free_port()
    command = sessions_command(glm, upstream=engine.url, port=port, extra=["--timeout", "60"])
    log = tmp_path_factory.mktemp("sessions") / "sessions.log"
    with Service("sessions", command, url=f"http://127.0.0.1:{port}", log=log) as service:
        service.wait_healthy(60)
        yield service


@pytest.fixture
def http(engine: Service, glm: Path) -> Iterator[httpx.Client]:
    """A client of the engine, which serves the first weights as version 0 again."""
    with httpx.Client(base_url=engine.url, timeout=60, trust_env=False) as client:
        push(engine, glm, 0)
        yield client
        client.post("/continue_generation", json={})
    assert engine.alive, engine.tail()


def serves(http: httpx.Client, truth: Truth) -> str:
    """Assert that the engine computes with these weights; the version that it says."""
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 8}, "return_logprob": True}
    answer = http.post("/generate", json=body).json()
    logprobs, _ = truth(PROMPT + answer["output_ids"])
    said = np.array([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    same_logprobs(said, logprobs[len(PROMPT) - 1 :])
    version: str = answer["meta_info"]["weight_version"]
    return version


def push(engine: Service, model: Path, version: int, method: Any = "disk", **options: Any) -> None:
    """The weights in a model directory."""
    tensors = load_file(model / "model.safetensors") if model.exists() else {}
    weights = Weights(model, lambda path: None, lambda: iter(tensors.items()))
    WeightSync([engine.url], SyncConfig(method=method, **options)).push(weights, version)


@pytest.mark.parametrize("method", ["disk", "tensor", "distributed"])
@pytest.mark.parametrize("pause", ["none", "retract"])
def test_three_ways(http: httpx.Client, engine: Service, glm: Path, other: Path, method: str, pause: str) -> None:
    assert serves(http, Truth(glm)) == "0"
    push(engine, other, 5, method, pause=pause)
    assert serves(http, Truth(other)) == "5"


def test_a_refusal(http: httpx.Client, engine: Service, other: Path, tmp_path: Path) -> None:
    push(engine, other, 1)
    missing = Weights(tmp_path / "000002", lambda path: None, lambda: iter(()))
    with pytest.raises(StaleWeights, match="serves 1"):
        WeightSync([engine.url], SyncConfig()).push(missing, 2)
    assert serves(http, Truth(other)) == "1"


def interrupted(
    sessions: Service, http: httpx.Client, act: Callable[[], object], **fields: Any
) -> tuple[httpx.Response, list[Trajectory]]:
    """An answer that `act` comes in between of, and what the session holds of it."""
    with (
        httpx.Client(base_url=sessions.url, timeout=60, trust_env=False) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        session = open_session(front)
        waits = pool.submit(chat, front, session, [USER], **FIELDS, **fields)
        wait(lambda: running(http) == 1)
        threading.Event().wait(0.3)  # for some tokens
        act()
        answer = waits.result(60)
        return answer, samples(front, session) if answer.status_code == 200 else []


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pausing_for_new_weights(http: httpx.Client, sessions: Service, glm: Path, other: Path, mode: str) -> None:
    def act() -> None:
        assert http.post("/pause_generation", json={"mode": mode}).status_code == 200
        # Keys and values in place are held by their request; retracted ones are not.
        assert http.post("/flush_cache").status_code == (400 if mode == "in_place" else 200)
        body = {"model_path": str(other), "weight_version": "1", "flush_cache": False}
        assert http.post("/update_weights_from_disk", json=body).json()["success"]
        assert http.post("/continue_generation", json={}).status_code == 200

    answer, [trajectory] = interrupted(sessions, http, act)
    assert answer.status_code == 200, answer.text
    tokens = trajectory.tokens.tolist()
    trained = np.flatnonzero(trajectory.loss_mask)
    first, cut = trained[0], int(trained[trajectory.version[trained] == 1][0])
    assert first < cut < trained[-1]
    assert trajectory.experts is not None
    rows = trajectory.experts
    (old, old_rows), (new, new_rows) = Truth(glm)(tokens), Truth(other)(tokens)
    # Up to the update the logprobs are the old weights', and so are the routes if nothing was computed again.
    same_logprobs(trajectory.logprobs[first:cut], old[first - 1 : cut - 1])
    before = slice(0, cut - 1)
    if mode == "in_place":
        same_routes(rows[before], old_rows[before])
        assert set(trajectory.provenance[before]) <= {PREFILL, DECODE}
        # New weights read the old ones' keys and values: neither's forward pass.
        assert np.abs(trajectory.logprobs[cut + 1 :] - new[cut:]).mean() > 0.1
    else:
        same_logprobs(trajectory.logprobs[cut:], new[cut - 1 :])
        same_routes(rows, new_rows)
        assert set(trajectory.provenance[before]) == {RECOMPUTED}
    assert set(trajectory.provenance[cut:]) == {DECODE}


def test_pausing_by_abort(http: httpx.Client, sessions: Service) -> None:
    """The answer ends as an error and leaves no record; new requests wait until generation goes on."""
    answer, _ = interrupted(sessions, http, lambda: http.post("/pause_generation", json={"mode": "abort"}))
    assert answer.status_code == 502
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}}
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(httpx.post, f"{http.base_url}/generate", json=body, timeout=60, trust_env=False)
        threading.Event().wait(0.5)
        assert not waits.done()
        http.post("/continue_generation", json={})
        assert waits.result(60).status_code == 200
