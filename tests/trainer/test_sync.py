"""New weights to two real engines: three ways, three pauses, and what is left when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pacenote.replay.record import DECODE, PREFILL, RECOMPUTED
from pacenote.rollout.launch import Service, engine_command, free_port, sessions_command
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import model as models
from pacenote.trainer.episode import Episode, check_versions
from pacenote.trainer.errors import EngineDied, StaleWeights
from pacenote.trainer.sync import SyncConfig, Weights, buckets, push, with_last
from pacenote.trainer.tasks import Task
from tests.rollout.talk import USER, chat, records, samples
from tests.rollout.talk import start as open_session
from tests.sglang.truth import Truth, same_logprobs, same_routes

WAIT = 60
METHODS: tuple[Any, ...] = ("disk", "tensor", "distributed")
DISK = SyncConfig()
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


HTTP = httpx.Client(timeout=WAIT, trust_env=False)


def logprobs(url: str) -> list[float]:
    body = {
        "input_ids": [10, 11, 12, 13], "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
    }  # fmt: skip
    answer = HTTP.post(f"{url}/generate", json=body)
    answer.raise_for_status()
    return [entry[0] for entry in answer.json()["meta_info"]["output_token_logprobs"]]


def version(url: str) -> str:
    return str(HTTP.get(f"{url}/model_info").json()["weight_version"])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def health(url: str) -> int:
    """200, or 503 while it is paused."""
    return HTTP.get(f"{url}/health_generate").status_code


def control(url: str, path: str, **body: Any) -> None:
    HTTP.post(f"{url}/{path}", json=body).raise_for_status()


# --- the ways --------------------------------------------------------------------------------------------------------


def test_all_ways_end_at_the_same_weights(urls: list[str], scaled: Scaled) -> None:
    start = logprobs(urls[0])
    found = {}
    for number, method in enumerate(METHODS, start=1):
        push(urls, scaled(1.0), 100 + number, DISK)
        assert logprobs(urls[0]) == start, "back where it began"
        config = SyncConfig(method=method, pause="abort", bucket_mb=1)
        for again in (0, 1):
            push(urls, scaled(1.25), 10 * number + again, config)
            assert [version(url) for url in urls] == [str(10 * number + again)] * 2
        found[method] = [logprobs(url) for url in urls]
        assert found[method][0] != start
    assert found["tensor"] == found["distributed"] == found["disk"]


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_between_buckets_nobody_answers(method: Any) -> None:
    with pytest.raises(ValueError, match=f"--sync.method {method} expects --sync.pause abort, retract or in_place"):
        SyncConfig(method=method)


def test_tensors_have_the_names_and_bits_of_the_disk(scaled: Scaled) -> None:
    weights = scaled(1.25)
    saved = load_file(weights.on_disk() / "model.safetensors")
    sent = dict(weights.tensors())
    assert sent.keys() == saved.keys()
    for name, tensor in saved.items():
        assert sent[name].dtype == tensor.dtype
        assert torch.equal(sent[name], tensor), name


# --- the pauses ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sessions(engines: list[Service], tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A session server in front of the first engine."""
    port = free_port()
    log = tmp_path_factory.mktemp("sessions") / "sessions.log"
    command = sessions_command(tiny_dir, upstream=engines[0].url, port=port)
    with Service("sessions", command, url=f"http://127.0.0.1:{port}", log=log) as service:
        service.wait_healthy(120)
        yield service.url


@pytest.mark.parametrize(
    ("pause", "method"),
    [
        ("none", "disk"), ("abort", "disk"), ("abort", "tensor"), ("retract", "disk"), ("retract", "distributed"),
        ("in_place", "tensor"), ("in_place", "distributed"),
    ],
)  # fmt: skip
def test_what_a_pause_does_to_a_request(
    urls: list[str], sessions: str, scaled: Scaled, pause: Any, method: Any
) -> None:
    """The table of docs/operations.md, with transformers' own forward pass as the judge of which weights spoke."""
    old, new = scaled(1.0), scaled(1.25)
    push(urls, old, 1, DISK)
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=sessions, timeout=WAIT, trust_env=False) as front:
        session = open_session(front)
        waits = pool.submit(chat, front, session, [USER], max_tokens=160, ignore_eos=True, temperature=1.0)
        until(lambda: waits.done() or used(urls[0]) > 40)
        assert not waits.done(), waits.result().text
        push(urls, new, 2, SyncConfig(method=method, pause=pause, bucket_mb=1))
        answer = waits.result(WAIT)
        assert [version(url) for url in urls] == ["2", "2"]
        if pause == "abort":
            assert answer.status_code == 502, "an error for the client"
            assert records(front, session) == [], "and nothing to train on"
            return
        assert answer.status_code == 200, answer.text
        [trajectory] = samples(front, session)
    judged(trajectory, Truth(old.on_disk()), Truth(new.on_disk()), pause)


def judged(trajectory: Trajectory, old: Truth, new: Truth, pause: str) -> None:
    tokens, trained = trajectory.tokens.tolist(), np.flatnonzero(trajectory.loss_mask)
    assert trajectory.experts is not None
    (logp, rows), (new_logp, new_rows) = old(tokens), new(tokens)
    first, later = trained[0], trained[trajectory.version[trained] == 2]
    cut = int(later[0]) if len(later) else len(tokens)
    assert set(trajectory.version[first:cut]) == {1}
    same_logprobs(trajectory.logprobs[first:cut], logp[first - 1 : cut - 1])
    if pause == "none":
        assert cut == len(tokens), "it was let finish"
        same_routes(trajectory.experts, rows)
        return
    assert first < cut < trained[-1]
    before = slice(0, cut - 1)
    if pause == "in_place":
        same_routes(trajectory.experts[before], rows[before])
        assert set(trajectory.provenance[before]) <= {PREFILL, DECODE}
        assert np.abs(trajectory.logprobs[cut + 1 :] - new_logp[cut:]).mean() > 1e-3, "from the old ones' keys"
    else:
        same_logprobs(trajectory.logprobs[cut:], new_logp[cut - 1 :])
        same_routes(trajectory.experts, new_rows)
        assert set(trajectory.provenance[before]) == {RECOMPUTED}
    assert set(trajectory.provenance[cut:]) == {DECODE}


def used(url: str) -> int:
    load = HTTP.get(f"{url}/v1/loads").json()["loads"][0]
    return int(load["num_used_tokens"])


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_engine_is_not_there(urls: list[str], scaled: Scaled, method: Any) -> None:
    """The other serves the new weights; each is named with what it serves."""
    push(urls, scaled(1.0), 1, DISK)
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineDied, match=f"{nobody} serves nobody knows what") as raised:
        push([urls[0], nobody], scaled(1.25), 2, SyncConfig(method=method, pause="retract"))
    assert f"{urls[0]} serves 2;" in str(raised.value)
    assert [version(url) for url in urls] == ["2", "1"]
    assert health(urls[0]) == 200
    push(urls, scaled(1.0), 3, DISK)  # and everything goes on
    assert len({tuple(logprobs(url)) for url in urls}) == 1


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_one_engine_refuses(urls: list[str], scaled: Scaled, method: Any) -> None:
    """It stays paused with its old version; nothing that it said is taken for the new one."""
    push(urls, scaled(1.0), 1, DISK)
    control(urls[1], "begin_weight_update")  # somebody else's session is open there
    with pytest.raises(StaleWeights, match="already open") as raised:
        push(urls, scaled(1.25), 2, SyncConfig(method=method, pause="retract"))
    assert f"{urls[0]} serves 2;" in str(raised.value)
    assert f"{urls[1]} serves 1 and is paused (begin_weight_update: 400" in str(raised.value)
    assert [health(url) for url in urls] == [200, 503], "it must not go on with old weights"
    control(urls[1], "end_weight_update")
    push(urls, scaled(1.25), 3, SyncConfig(method=method, pause="retract"))
    assert [health(url) for url in urls] == [200, 200], "the next push takes it back in"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["shape", "name"])
def test_wrong_weights_change_nothing(urls: list[str], scaled: Scaled, method: Any, kind: str, tmp_path: Path) -> None:
    """The engines refuse, keep what they have, stay paused, and the next push finds them in order."""
    good = scaled(1.0)
    push(urls, good, 1, DISK)
    before = logprobs(urls[0])
    bad = {"shape": ("lm_head.weight", torch.zeros(3, 3)), "name": ("nobody.weight", torch.zeros(3))}[kind]
    wrong = replace(good, path=tmp_path, tensors=lambda: iter([*good.tensors(), bad]))  # an empty directory
    config = SyncConfig(method=method, pause="abort", bucket_mb=1)
    with pytest.raises(StaleWeights, match="and is paused"):
        push(urls, wrong, 2, config)
    assert [version(url) for url in urls] == ["1", "1"]
    assert [health(url) for url in urls] == [503, 503]
    for url in urls:
        control(url, "continue_generation")
    assert logprobs(urls[0]) == before
    push(urls, scaled(1.25), 3, config)
    assert [version(url) for url in urls] == ["3", "3"]


def test_an_engine_that_did_not_pause_does_so_when_it_refuses(urls: list[str], scaled: Scaled, tmp_path: Path) -> None:
    push(urls, scaled(1.0), 1, DISK)
    with pytest.raises(StaleWeights, match="serves 1 and is paused"):
        push(urls, replace(scaled(1.0), path=tmp_path), 2, DISK)
    assert [health(url) for url in urls] == [503, 503]
    push(urls, scaled(1.25), 3, DISK)
    assert [health(url) for url in urls] == [200, 200], "a push that did not pause takes them back in, too"
    assert [version(url) for url in urls] == ["3", "3"]


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_the_trainer_fails_in_the_middle(urls: list[str], scaled: Scaled, method: Any) -> None:
    """Its own error comes through; nobody serves a part or calls it new, and the next push can begin."""
    push(urls, scaled(1.0), 1, DISK)
    whole, config = scaled(1.25), SyncConfig(method=method, pause="retract", bucket_mb=1)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(whole.tensors())[:60]
        raise MemoryError("no memory for the rest")

    with pytest.raises(MemoryError, match="for the rest"):
        push(urls, replace(whole, tensors=broken), 2, config)
    assert [version(url) for url in urls] == ["1", "1"]
    assert [health(url) for url in urls] == [503, 503]
    push(urls, whole, 3, config)
    assert [version(url) for url in urls] == ["3", "3"]
    assert [health(url) for url in urls] == [200, 200]
    assert logprobs(urls[0]) == logprobs(urls[1])


def test_weights_are_on_disk_before_anybody_pauses(urls: list[str], scaled: Scaled, tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError("no space left")

    push(urls, scaled(1.0), 1, DISK)
    weights = replace(scaled(1.25), path=tmp_path / "000002", save=full)
    with pytest.raises(OSError, match="no space left"):
        push(urls, weights, 2, SyncConfig(pause="abort"))
    assert [health(url) for url in urls] == [200, 200]


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_that_says_another_version_afterwards(urls: list[str], scaled: Scaled, method: Any) -> None:
    """It took all calls and said yes."""
    push(urls, scaled(1.0), 1, DISK)
    with forgetful(urls[1]) as front, pytest.raises(StaleWeights, match="serves 1 and is paused") as raised:
        push([urls[0], front], scaled(1.25), 2, SyncConfig(method=method, pause="abort"))
    assert f"{urls[0]} serves 2;" in str(raised.value)
    assert [health(url) for url in urls] == [200, 503]
    push(urls, scaled(1.0), 8, SyncConfig(pause="abort"))


@contextmanager
def forgetful(engine: str) -> Iterator[str]:
    """A proxy of a real engine that loses the weight version of what it passes on."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(HTTP.get(engine + self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body.pop("weight_version", None)
            self.answer(HTTP.post(engine + self.path, json=body))

        def answer(self, answer: httpx.Response) -> None:
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers.get("content-type", "text/plain"))
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_part_of_the_weights(urls: list[str], scaled: Scaled) -> None:
    """Tensors that are not sent stay: the head, and then all but the head."""
    push(urls, scaled(1.0), 1, DISK)
    start, whole, config = logprobs(urls[0]), scaled(1.25), SyncConfig(method="tensor", pause="abort")
    chosen = [named for named in whole.tensors() if named[0] == "lm_head.weight"]
    assert len(chosen) == 1
    push(urls, replace(whole, tensors=lambda: iter(chosen)), 2, config)
    headed = logprobs(urls[0])
    assert headed != start
    rest = replace(whole, tensors=lambda: (n for n in whole.tensors() if n[0] != "lm_head.weight"))
    push(urls, rest, 3, config)
    at_once = logprobs(urls[0])
    push(urls, whole, 4, DISK)
    assert logprobs(urls[0]) == at_once != headed


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_an_engine_that_dies_in_the_middle(
    tiny_dir: Path, urls: list[str], scaled: Scaled, tmp_path: Path, method: Any
) -> None:
    """The others have the new weights whole and go on."""
    port = free_port()
    command = engine_command(tiny_dir, port=port, context_length=100, dtype="float32", weight_version="1")
    push(urls, scaled(1.0), 1, DISK)
    with Service("doomed", command, url=f"http://127.0.0.1:{port}", log=tmp_path / "log") as doomed:
        doomed.wait_healthy(120)
        weights = scaled(1.25)
        total = sum(1 for _ in weights.tensors())

        def deadly() -> Iterator[tuple[str, torch.Tensor]]:
            for number, named in enumerate(weights.tensors()):
                if number == total - 2:  # in the last of several buckets
                    assert doomed.pid is not None
                    os.kill(doomed.pid, signal.SIGKILL)
                yield named

        config = SyncConfig(method=method, pause="abort", bucket_mb=1)
        with pytest.raises(EngineDied, match=f"{doomed.url} serves nobody knows what") as raised:
            push([doomed.url, *urls], replace(weights, tensors=deadly), 2, config)
    assert f"{urls[0]} serves 2;" in str(raised.value)
    assert [version(url) for url in urls] == ["2", "2"]
    assert [health(url) for url in urls] == [200, 200]
    changed = [logprobs(url) for url in urls]
    push(urls, weights, 3, DISK)
    assert [logprobs(url) for url in urls] == changed


# --- parts -----------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 40), max_size=12), limit=st.integers(1, 100))
def test_buckets_hold_everything_in_order(sizes: list[int], limit: int) -> None:
    tensors = [(str(number), torch.zeros(size)) for number, size in enumerate(sizes)]
    found = list(buckets(iter(tensors), limit))
    assert [name for bucket in found for name, _ in bucket] == [name for name, _ in tensors]
    for bucket in found:
        assert bucket
        assert sum(4 * t.numel() for _, t in bucket) <= limit or len([t for _, t in bucket if t.numel()]) == 1


@given(st.lists(st.integers(), max_size=5))
def test_the_last_is_known(items: list[int]) -> None:
    found = list(with_last(iter(items)))
    assert [item for item, _ in found] == items
    assert [last for _, last in found] == [False] * (len(items) - 1) + [True] * bool(items)


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
    return Episode(Task(messages=[]), [], 1.0, [trajectory])


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
