"""New weights for a running SGLang, and what each way of pausing does to logprobs and routes of the answers at hand.

Held against transformers with the old and with the new weights, so that it shows which of them a number came from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from pacenote.replay.record import DECODE, PREFILL, RECOMPUTED
from pacenote.rollout.launch import Service, free_port, sessions_command
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import sync
from pacenote.trainer.errors import StaleWeights
from pacenote.trainer.model import build_tiny
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
        sync.push([engine.url], sync.saved_weights(glm), 0, sync.SyncConfig())
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


@pytest.mark.parametrize("method", ["disk", "tensor", "distributed"])
@pytest.mark.parametrize("pause", ["abort", "retract", "in_place"])
def test_new_weights(
    http: httpx.Client, engine: Service, glm: Path, other: Path, tmp_path: Path, method: Any, pause: Any
) -> None:
    config = sync.SyncConfig(method=method, pause=pause, bucket_mb=1)
    assert serves(http, Truth(glm)) == "0"
    for version in (1, 2):
        sync.push([engine.url], sync.saved_weights(other), version, config)
        assert serves(http, Truth(other)) == str(version)


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_the_version_comes_with_the_last_bucket(http: httpx.Client, engine: Service, other: Path, method: Any) -> None:
    weights, seen = sync.saved_weights(other), []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for number, named in enumerate(weights.tensors()):
            if number % 40 == 0:
                seen.append(http.get("/model_info").json()["weight_version"])
            yield named

    config = sync.SyncConfig(method=method, pause="abort", bucket_mb=1)
    sync.push([engine.url], replace(weights, tensors=watched), 3, config)
    assert set(seen) == {"0"}


def test_refused(http: httpx.Client, engine: Service, glm: Path, tmp_path: Path) -> None:
    nowhere = replace(sync.saved_weights(glm), path=tmp_path)
    with pytest.raises(StaleWeights, match="serves 0 and is paused"):
        sync.push([engine.url], nowhere, 2, sync.SyncConfig(pause="abort"))
    http.post("/continue_generation", json={})
    assert serves(http, Truth(glm)) == "0"


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
