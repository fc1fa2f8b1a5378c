"""New weights for a running SGLang, and what each way of pausing does to logprobs and routes of the answers at hand.

Held against transformers with the old and with the new weights, so that it shows which of them a number came from.
"""

from __future__ import annotations

import base64
import importlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file

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
        sync.push(engine.url, glm, 0)
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


def test_from_disk(http: httpx.Client, engine: Service, glm: Path, other: Path, tmp_path: Path) -> None:
    assert serves(http, Truth(glm)) == "0"
    sync.push(engine.url, other, 1)
    assert serves(http, Truth(other)) == "1"
    with pytest.raises(StaleWeights, match="refused weight version 2"):
        sync.push(engine.url, tmp_path / "nowhere", 2)
    assert serves(http, Truth(other)) == "1"


def test_from_tensors(http: httpx.Client, other: Path) -> None:
    """Shared memory by file: a sender that hands over descriptors instead ends SGLang's scheduler."""
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    named = list(load_file(other / "model.safetensors").items())
    pickled = io.BytesIO()
    ForkingPickler(pickled).dump(named)
    text = base64.b64encode(pickled.getvalue()).decode()
    assert http.post("/begin_weight_update", json={}).json()["success"]
    body = {"serialized_named_tensors": [text], "flush_cache": True, "weight_version": "5"}
    answer = http.post("/update_weights_from_tensor", json=body)
    assert answer.json()["success"], answer.text
    assert http.post("/end_weight_update", json={}).json()["success"]
    assert serves(http, Truth(other)) == "5"


def test_over_a_process_group(http: httpx.Client, other: Path) -> None:
    """The sender is rank 0 of a group of gloo's, SGLang rank 1; tensors go one after the other, as they are named."""
    state, port, name = load_file(other / "model.safetensors"), free_port(), "pacenote"
    joins = {
        "master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2, "group_name": name,
        "backend": "gloo",
    }  # fmt: skip
    update = {
        "names": list(state), "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in state.values()],
        "shapes": [list(tensor.shape) for tensor in state.values()], "group_name": name, "flush_cache": True,
        "weight_version": "6",
    }  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(http.post, "/init_weights_update_group", json=joins)
        group = sender(port, name)
        assert joined.result(60).json()["success"]
        assert http.post("/begin_weight_update", json={}).json()["success"]
        taken = pool.submit(http.post, "/update_weights_from_distributed", json=update)
        for tensor in state.values():
            torch.distributed.broadcast(tensor.contiguous(), src=0, group=group)
        assert taken.result(60).json()["success"], taken.result().text
    assert http.post("/end_weight_update", json={}).json()["success"]
    assert serves(http, Truth(other)) == "6"
    assert http.post("/destroy_weights_update_group", json={"group_name": name}).json()["success"]


def sender(port: int, name: str) -> Any:
    """Rank 0 of a group of two beside whatever groups there are, met at this port: as SGLang's own side makes its."""
    c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    timeout = timedelta(seconds=60)
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True, timeout=timeout)  # type: ignore[attr-defined]
    group, _ = c10d._new_process_group_helper(
        2, 0, [], c10d.Backend("gloo"), c10d.PrefixStore(name, store), group_name=name, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    return group


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
