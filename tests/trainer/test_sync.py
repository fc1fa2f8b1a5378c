"""New weights to two real engines: three ways, three pauses, and what is left when one of them fails."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pacenote.rollout.embedded_weights import read_tensors
from pacenote.rollout.launch import Service, engine_command, free_port
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import model as models
from pacenote.trainer.collect import Episode, check_versions
from pacenote.trainer.errors import EngineDied, StaleWeights
from pacenote.trainer.sync import SyncConfig, Weights, WeightSync, buckets, shared
from pacenote.trainer.tasks import Task

WAIT = 60
METHODS = ("disk", "tensor", "distributed")
Scaled = Callable[[float], Weights]


@pytest.fixture(scope="module")
def engines(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    logs = tmp_path_factory.mktemp("engines")
    with ExitStack() as stack:
        made = []
        for name in ("one", "two"):
            port = free_port()
            command = engine_command(tiny_dir, port=port, context_length=400, dtype="float32", weight_version="0")
            service = Service(name, command, url=f"http://127.0.0.1:{port}", log=logs / f"{name}.log")
            made.append(stack.enter_context(service))
        for service in made:
            service.wait_healthy(120)
        yield made


@pytest.fixture
def urls(engines: list[Service]) -> list[str]:
    return [service.url for service in engines]


@pytest.fixture(scope="module")
def scaled(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Scaled:
    """Makes the tiny model's weights with its head multiplied."""
    root = tmp_path_factory.mktemp("weights")

    def make(factor: float) -> Weights:
        model = models.load(tiny_dir)
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
            for name, parameter in model.named_parameters():
                if "experts.gate_up_proj" in name:
                    parameter.mul_(factor)

        def save(path: Path) -> None:
            models.save(model, path, tokenizer_from=tiny_dir)

        return Weights(root / f"{int(factor * 100):06d}", save, lambda: models.disk_tensors(model))

    return make


def ask(url: str, **fields: Any) -> dict[str, Any]:
    body = {
        "input_ids": [10, 11, 12, 13], "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
        "return_logprob": True, "return_routed_experts": True,
    }  # fmt: skip
    answer = httpx.post(f"{url}/generate", json=body | fields, timeout=WAIT, trust_env=False)
    answer.raise_for_status()
    meta: dict[str, Any] = answer.json()["meta_info"]
    return meta


def logprobs(url: str) -> list[float]:
    return [entry[0] for entry in ask(url)["output_token_logprobs"]]


def version(url: str) -> str:
    return str(httpx.get(f"{url}/model_info", trust_env=False).json()["weight_version"])


# --- the ways --------------------------------------------------------------------------------------------------------


def test_all_ways_end_at_the_same_weights(urls: list[str], scaled: Scaled) -> None:
    start = logprobs(urls[0])
    found = {}
    for number, method in enumerate(METHODS, start=1):
        back = WeightSync(urls, SyncConfig())
        back.push(scaled(1.0), 100 + number)
        assert logprobs(urls[0]) == start, "back where it began"
        sync = WeightSync(urls, SyncConfig(method=method, bucket_mb=1))  # type: ignore[arg-type]
        for again in (0, 1):  # a group is used again
            sync.push(scaled(1.25), 10 * number + again)
            assert [version(url) for url in urls] == [str(10 * number + again)] * 2
        found[method] = [logprobs(url) for url in urls]
        assert found[method][0] != start
    assert found["tensor"] == found["distributed"] == found["disk"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pause", ["none", "abort", "retract", "in_place"])
def test_what_a_pause_does_to_a_request(urls: list[str], scaled: Scaled, method: Any, pause: Any) -> None:
    """The table of docs/operations.md."""
    WeightSync(urls, SyncConfig()).push(scaled(1.0), 1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            ask, urls[0], sampling_params={"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
        )
        until(lambda: used(urls[0]) > 12)
        WeightSync(urls, SyncConfig(method=method, pause=pause)).push(scaled(1.25), 2)
        meta = running.result(WAIT)
    kind, count = meta["finish_reason"]["type"], meta["completion_tokens"]
    spans = [span["version"] for span in meta["weight_versions"]]
    rows = len(base64.b64decode(meta["routed_experts"])) // 4 // 6 // 2
    assert rows == 4 + count - 1
    assert kind == ("abort" if pause == "abort" else "length")
    assert spans == (["1"] if pause in ("abort", "none") else ["1", "2"])
    assert (count < 200) == (pause == "abort")
    assert meta.get("num_retractions", 0) == (1 if pause == "retract" else 0)
    assert [version(url) for url in urls] == ["2", "2"]


def used(url: str) -> int:
    load = httpx.get(f"{url}/v1/loads", trust_env=False).json()["loads"][0]
    return int(load["num_used_tokens"])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_engine_is_not_there(urls: list[str], scaled: Scaled, method: Any) -> None:
    """The others serve the new weights (from disk, from tensors), or nobody does; each is named with what it serves."""
    WeightSync(urls, SyncConfig()).push(scaled(1.0), 1)
    nobody = f"http://127.0.0.1:{free_port()}"
    config = SyncConfig(method=method, pause="retract", timeout=3.0)
    with pytest.raises(EngineDied, match=f"{nobody} serves nobody knows what") as raised:
        WeightSync([urls[0], nobody], config).push(scaled(1.25), 2)
    assert f"{urls[0]} serves {version(urls[0])}" in str(raised.value)
    assert version(urls[0]) == ("1" if method == "distributed" else "2")
    WeightSync(urls, SyncConfig(pause="retract")).push(scaled(1.0), 3)  # and everything goes on
    assert len({tuple(logprobs(url)) for url in urls}) == 1


def test_one_engine_refuses(urls: list[str], scaled: Scaled, tmp_path: Path) -> None:
    """It stays paused with its old version; nothing that it said is taken for the new one."""
    WeightSync(urls, SyncConfig()).push(scaled(1.0), 1)
    httpx.post(f"{urls[1]}/begin_weight_update", json={}, trust_env=False)  # somebody else's session is open there
    with pytest.raises(StaleWeights, match="already open") as raised:
        WeightSync(urls, SyncConfig(method="tensor", pause="retract")).push(scaled(1.25), 2)
    assert f"{urls[0]} serves 2" in str(raised.value)
    assert f"{urls[1]} serves 1 (begin_weight_update: 400" in str(raised.value)
    assert httpx.get(f"{urls[1]}/health_generate", trust_env=False).status_code == 503, "it goes on with old weights"
    assert httpx.get(f"{urls[0]}/health_generate", trust_env=False).status_code == 200
    httpx.post(f"{urls[1]}/end_weight_update", json={}, trust_env=False)
    httpx.post(f"{urls[1]}/continue_generation", json={}, trust_env=False)


def test_weights_of_another_shape_change_nothing(urls: list[str], scaled: Scaled) -> None:
    good = scaled(1.0)
    WeightSync(urls, SyncConfig()).push(good, 1)
    before = logprobs(urls[0])
    for bad, message in (
        ([("lm_head.weight", torch.zeros(3, 3))], r"expected lm_head.weight of shape \[512, 64\], got \[3, 3\]"),
        ([("nobody.weight", torch.zeros(3))], "to be one of the model's tensors"),
    ):
        wrong = replace(good, tensors=lambda bad=bad: iter([*good.tensors(), *bad]))  # type: ignore[misc]
        with pytest.raises(StaleWeights, match=message):
            WeightSync(urls, SyncConfig(method="tensor")).push(wrong, 2)
        assert [version(url) for url in urls] == ["1", "1"]
        assert logprobs(urls[0]) == before


def test_a_part_of_the_weights(urls: list[str], scaled: Scaled) -> None:
    """Tensors that are not sent stay: the head and one expert, of the model as it is on disk."""
    WeightSync(urls, SyncConfig()).push(scaled(1.0), 1)
    start, whole = logprobs(urls[0]), scaled(1.25)
    chosen = [named for named in whole.tensors() if named[0] == "lm_head.weight"]
    assert len(chosen) == 1
    part = replace(whole, tensors=lambda: iter(chosen))
    WeightSync(urls, SyncConfig(method="tensor")).push(part, 2)
    headed = logprobs(urls[0])
    assert headed != start
    rest = replace(whole, tensors=lambda: (n for n in whole.tensors() if n[0] != "lm_head.weight"))
    WeightSync(urls, SyncConfig(method="tensor")).push(rest, 3)
    at_once = logprobs(urls[0])
    WeightSync(urls, SyncConfig()).push(whole, 4)
    assert logprobs(urls[0]) == at_once != headed


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_that_dies_in_the_middle(
    tiny_dir: Path, urls: list[str], scaled: Scaled, tmp_path: Path, method: Any
) -> None:
    if method == "disk":
        pytest.skip("from disk there is no middle that a test could stop at")
    port = free_port()
    command = engine_command(tiny_dir, port=port, context_length=100, dtype="float32", weight_version="1")
    WeightSync(urls, SyncConfig()).push(scaled(1.0), 1)
    with Service("doomed", command, url=f"http://127.0.0.1:{port}", log=tmp_path / "log") as doomed:
        doomed.wait_healthy(120)
        weights, sent = scaled(1.25), threading.Event()

        def slowly() -> Iterator[tuple[str, torch.Tensor]]:
            for number, named in enumerate(weights.tensors()):
                if number == 40 and not sent.is_set():
                    sent.set()
                    assert doomed.pid is not None
                    os.kill(doomed.pid, signal.SIGKILL)
                    time.sleep(0.2)
                yield named[0], named[1].repeat(1) if named[1].ndim else named[1]

        config = SyncConfig(method=method, pause="abort", bucket_mb=1, timeout=20.0)
        small = replace(weights, tensors=slowly)
        with pytest.raises(EngineDied, match=f"{doomed.url} serves nobody knows what"):
            WeightSync([urls[0], doomed.url], config).push(small, 2)
    WeightSync(urls, SyncConfig(pause="abort")).push(scaled(1.0), 3)
    assert [version(url) for url in urls] == ["3", "3"]
    assert httpx.get(f"{urls[0]}/health_generate", trust_env=False).status_code == 200


# --- parts -----------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 40), max_size=12), limit=st.integers(1, 100))
def test_buckets_hold_everything_in_order(sizes: list[int], limit: int) -> None:
    tensors = [(str(number), torch.zeros(size)) for number, size in enumerate(sizes)]
    found = list(buckets(iter(tensors), limit))
    assert [name for bucket in found for name, _ in bucket] == [name for name, _ in tensors]
    for bucket in found:
        assert bucket
        assert sum(4 * t.numel() for _, t in bucket) <= limit or len([t for _, t in bucket if t.numel()]) == 1


def test_shared_memory_is_read_and_copied() -> None:
    tensors = [
        ("a", torch.arange(6.0).reshape(2, 3)),
        ("b", torch.ones(3, dtype=torch.bfloat16)),
        ("c", torch.zeros(0)),
    ]
    found = dict(read_tensors(shared(tensors)))
    for name, tensor in tensors:
        assert torch.equal(found[name], tensor)
    tensors[0][1].fill_(9)
    assert found["a"][0, 0] == 0, "a copy"


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/pacenote-was-here",)


@pytest.mark.parametrize(
    "payload",
    [b"", b"AAAA", pickle.dumps([("a", Evil())]), pickle.dumps([("a", 1)]), pickle.dumps({"a": 1}), pickle.dumps(5)],
)
def test_pickles_of_other_things_are_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="expected serialized_named_tensors"):
        read_tensors(base64.b64encode(payload).decode())
    assert not Path("/tmp/pacenote-was-here").exists()


def test_tied_weights_are_sent_once(tiny_dir: Path) -> None:
    model = models.load(tiny_dir)
    saved = dict(models.disk_tensors(model))
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in saved
    model.lm_head.weight = model.model.embed_tokens.weight
    assert len(dict(models.disk_tensors(model))) == len(saved) - 1


# --- how old samples may be ------------------------------------------------------------------------------------------


def episode(*versions: int) -> Episode:
    """One sample whose tokens, but for the first, were generated by these versions."""
    n = len(versions) + 1
    trajectory = Trajectory(
        tokens=np.arange(n, dtype=np.int32),
        loss_mask=np.array([0, *[1] * (n - 1)], dtype=np.uint8),
        logprobs=np.full(n, -1.0, dtype=np.float32),
        experts=None,
        provenance=np.zeros(n - 1, dtype=np.uint8),
        version=np.array([-1, *versions], dtype=np.int32),
    )
    return Episode(Task([], ""), [], 1.0, [trajectory])


@given(
    ages=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=5), newest=st.integers(4, 9),
    bound=st.integers(1, 4),
)  # fmt: skip
def test_samples_that_are_too_old_are_left_out(ages: list[list[int]], newest: int, bound: int) -> None:
    episodes = [episode(*(newest - age for age in own)) for own in ages]
    kept, dropped = check_versions(episodes, newest, bound=bound)
    assert dropped == sum(max(own) > bound for own in ages)
    assert [len(e.trajectories) for e in kept] == [int(max(own) <= bound) for own in ages]
    assert [e.reward for e in kept] == [e.reward for e in episodes]


def test_versions_that_cannot_be() -> None:
    for versions, bound in (((3,), 0), ((5, 4), 0), ((6,), 0), ((6,), 3), ((-1,), 3)):
        with pytest.raises(StaleWeights, match="expected every answer from weight version 5"):
            check_versions([episode(*versions)], 5, bound=bound)
    assert check_versions([episode(5, 5)], 5)[1] == 0
