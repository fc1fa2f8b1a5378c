"""The scheduler in-process, in float32: answers equal what transformers computes for each sequence alone."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pacenote.replay.hf import attach
from pacenote.rollout.embedded_engine import Engine
from pacenote.rollout.embedded_model import ModelError, Runner
from pacenote.rollout.embedded_request import Completion, Request, RequestError, SamplingParams
from pacenote.rollout.embedded_sampling import generator
from pacenote.trainer.model import build_tiny, load

WAIT = 60.0


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def runner(tiny_dir: Path) -> Runner:
    return Runner(tiny_dir, dtype="float32", slots=6, context_length=96)


@pytest.fixture
def engine(runner: Runner, tiny_dir: Path) -> Iterator[Engine]:
    engine = Engine(runner, weight_version="0", prefill_tokens=64)
    engine.start()
    yield engine
    engine.stop()
    assert not engine.alive
    runner.load_weights(tiny_dir)
    runner.cache.clear()


def _request(number: int, length: int, *, routes: bool = True, stop_ids: Any = (), **params: Any) -> Request:
    ids = np.random.default_rng(number).integers(0, 480, size=length).tolist()
    return Request(
        rid=f"r{number}",
        prompt_ids=ids,
        params=SamplingParams(**params),
        stop_ids=frozenset(stop_ids),
        generator=generator(None, engine_seed=0, number=number),
        record_routes=routes,
    )


def _at_step(engine: Engine, patch: pytest.MonkeyPatch, step: int, action: Callable[[], Future[None]]) -> Future[None]:
    """Do something in the middle of decode step `step`; the engine acts on it before the next one."""
    decode, calls, done = engine.runner.decode, itertools.count(1), Future[None]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == step:
            action().add_done_callback(lambda future: done.set_result(future.result()))
        return decode(*args, **kwargs)

    patch.setattr(engine.runner, "decode", counted)
    return done


def _check(model: Any, request: Request, done: Completion, *, temperature: float = 1.0) -> None:
    """Logprobs and routes of an answer are those of one full forward pass over its tokens."""
    tokens = request.prompt_ids + list(done.output_ids)
    logits, rows = _forward(model, tokens)
    logp = torch.log_softmax(logits / temperature, -1)
    expected = [float(logp[len(request.prompt_ids) - 1 + i, token]) for i, token in enumerate(done.output_ids)]
    np.testing.assert_allclose(done.logprobs, expected, atol=1e-4)
    assert done.rows is not None
    assert done.rows.dtype == np.uint8
    assert done.rows.shape == (len(tokens) - 1, *rows.shape[1:])
    np.testing.assert_array_equal(np.sort(done.rows), np.sort(rows[:-1]))


def _forward(model: Any, tokens: list[int]) -> tuple[torch.Tensor, Any]:
    """Logits [N, V] float64 and routes [N, L, K] of one full forward pass."""
    replay = attach(model)
    try:
        with torch.inference_mode(), replay.record() as recorded:
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].double()
            return logits, recorded.rows()[0].numpy()
    finally:
        replay.detach()


def test_answers_of_a_busy_engine_match_transformers(engine: Engine, tiny_dir: Path) -> None:
    model = load(tiny_dir)
    shapes = [(1, 5), (30, 1), (7, 20), (64, 3), (2, 9), (90, 6), (13, 2), (40, 11), (3, 30), (5, 5)]
    requests = [
        _request(number, length, max_new_tokens=new, temperature=0.7) for number, (length, new) in enumerate(shapes)
    ]
    futures = [engine.submit(request) for request in requests]  # more than there are slots
    for request, future, (_, new) in zip(requests, futures, shapes, strict=True):
        done = future.result(WAIT)
        assert done.finish_reason == {"type": "length", "length": new}
        assert done.weight_versions == (("0", 0, new),)
        _check(model, request, done, temperature=0.7)
    load_now = engine.load()
    assert (load_now.running, load_now.waiting) == (0, 0)


def test_an_answer_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    alone = engine.submit(_request(3, 8, max_new_tokens=7)).result(WAIT)
    crowd = [engine.submit(_request(number, 5 + number, max_new_tokens=4 + number)) for number in range(8)]
    again = crowd[3].result(WAIT)
    assert again.output_ids == alone.output_ids
    np.testing.assert_allclose(again.logprobs, alone.logprobs, atol=1e-5)


def test_stop_tokens_stop_texts_and_the_context_end_an_answer(engine: Engine, runner: Runner) -> None:
    greedy = engine.submit(_request(1, 8, max_new_tokens=6, temperature=0.0)).result(WAIT).output_ids
    third = greedy[2]
    where = greedy.index(third) + 1
    stopped = engine.submit(_request(1, 8, temperature=0.0, stop_ids=[third])).result(WAIT)
    assert stopped.output_ids == greedy[:where]
    assert stopped.finish_reason == {"type": "stop", "matched": third}
    ignoring = engine.submit(
        _request(1, 8, temperature=0.0, max_new_tokens=6, stop_ids=[third], ignore_eos=True)
    ).result(WAIT)
    assert ignoring.output_ids == greedy
    last = engine.submit(_request(1, 8, temperature=0.0, max_new_tokens=where, stop_ids=[third])).result(WAIT)
    assert last.finish_reason == {"type": "length", "length": where}  # length comes first, as in SGLang
    text = runner.tokenizer.decode(greedy[:4])
    matched = engine.submit(_request(1, 8, temperature=0.0, stop=(text[1:],))).result(WAIT)
    assert matched.finish_reason == {"type": "stop", "matched": text[1:]}
    assert len(matched.output_ids) <= 4
    full = engine.submit(_request(2, 90, ignore_eos=True)).result(WAIT)
    assert full.finish_reason == {"type": "length", "length": 6}


def test_abort_delivers_what_there_is(engine: Engine, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.pause("in_place").result(WAIT)
    waiting = engine.submit(_request(11, 4, max_new_tokens=50))
    engine.abort("r11").result(WAIT)
    nothing = waiting.result(WAIT)
    assert nothing.output_ids == ()
    assert nothing.finish_reason["type"] == "abort"
    assert nothing.rows is None
    engine.resume().result(WAIT)
    aborted = _at_step(engine, monkeypatch, 4, lambda: engine.abort("r2"))  # a prefix, as in SGLang
    long = [_request(number, 4, max_new_tokens=90, ignore_eos=True) for number in (20, 21, 30)]
    futures = [engine.submit(request) for request in long]
    aborted.result(WAIT)
    for request, future in zip(long[:2], futures[:2], strict=True):
        done = future.result(WAIT)
        assert done.finish_reason["type"] == "abort"
        assert 0 < len(done.output_ids) < 90
        _check(load(tiny_dir), request, done)
    engine.abort("r3", exact=True).result(WAIT)
    assert futures[2].result(WAIT).finish_reason["type"] == "length"


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_in_the_middle_changes_nothing(
    engine: Engine, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    expected = engine.submit(_request(5, 10, max_new_tokens=40, ignore_eos=True)).result(WAIT)
    paused = _at_step(engine, monkeypatch, 10, lambda: engine.pause(mode))
    request = _request(5, 10, max_new_tokens=40, ignore_eos=True)
    future = engine.submit(request)
    paused.result(WAIT)
    assert engine.flush().result(WAIT) is (mode == "retract")
    assert not future.done()
    engine.resume().result(WAIT)
    done = future.result(WAIT)
    assert done.output_ids == expected.output_ids
    assert done.retractions == (1 if mode == "retract" else 0)
    _check(load(tiny_dir), request, done)


def test_pause_abort_ends_everything(engine: Engine) -> None:
    futures = [engine.submit(_request(number, 4, max_new_tokens=90, ignore_eos=True)) for number in range(9)]
    engine.pause("abort").result(WAIT)
    assert {future.result(WAIT).finish_reason["type"] for future in futures} == {"abort"}
    engine.resume().result(WAIT)


def test_new_weights_wait_for_running_requests_and_serve_the_next(
    engine: Engine, tiny_dir: Path, other_dir: Path
) -> None:
    old, new = (_request(number, 12, max_new_tokens=40, ignore_eos=True) for number in (1, 2))
    first = engine.submit(old)
    update = engine.update_weights(other_dir, version="1")
    second = engine.submit(new)
    assert update.result(WAIT).success
    assert first.done()
    _check(load(tiny_dir), old, first.result(WAIT))
    done = second.result(WAIT)
    assert done.weight_versions == (("1", 0, 40),)
    _check(load(other_dir), new, done)


def test_new_weights_in_place_are_seen_token_by_token(
    engine: Engine, tiny_dir: Path, other_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = _at_step(engine, monkeypatch, 5, lambda: engine.pause("in_place"))
    request = _request(4, 6, max_new_tokens=20, ignore_eos=True)
    future = engine.submit(request)
    paused.result(WAIT)
    refused = engine.update_weights(other_dir, version="1").result(WAIT)
    assert not refused.success
    assert "flush_cache" in refused.message
    assert engine.weight_version == "0"
    result = engine.update_weights(other_dir, version="1", flush=False).result(WAIT)
    assert result.success
    assert result.num_paused_requests == 1
    engine.resume().result(WAIT)
    done = future.result(WAIT)
    [(name, start, cut), (after, again, end)] = done.weight_versions
    assert (name, start, after, again, end) == ("0", 0, "1", cut, 20)
    assert cut == 6
    # The tokens before the update are exactly those of the old weights.
    part = Request(rid="", prompt_ids=request.prompt_ids, params=request.params, generator=request.generator)
    _check(load(tiny_dir), part, Completion(
        output_ids=done.output_ids[:cut], logprobs=done.logprobs[:cut], top_logprobs=(), finish_reason={},
        rows=done.rows[: 5 + cut] if done.rows is not None else None, weight_versions=()))  # fmt: skip


def test_a_retracted_request_has_the_rows_of_its_second_time(
    engine: Engine, tiny_dir: Path, other_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = _at_step(engine, monkeypatch, 5, lambda: engine.pause("retract"))
    request = _request(4, 6, max_new_tokens=20, ignore_eos=True)
    future = engine.submit(request)
    paused.result(WAIT)
    assert engine.update_weights(other_dir, version="1").result(WAIT).success
    engine.resume().result(WAIT)
    done = future.result(WAIT)
    cut = done.weight_versions[0][2]
    assert done.rows is not None
    assert len(done.rows) == 6 + 20 - 1
    # The logprobs before the update are the old weights', and all rows are the new ones': SGLang's answer.
    tokens = request.prompt_ids + list(done.output_ids)
    logp = torch.log_softmax(_forward(load(tiny_dir), tokens)[0], -1)
    old = [float(logp[len(request.prompt_ids) - 1 + i, token]) for i, token in enumerate(done.output_ids[:cut])]
    np.testing.assert_allclose(done.logprobs[:cut], old, atol=1e-4)
    np.testing.assert_array_equal(np.sort(done.rows), np.sort(_forward(load(other_dir), tokens)[1][:-1]))


def _broken(kind: str, other_dir: Path, out: Path) -> Path:
    shutil.copytree(other_dir, out)
    weights = load_file(out / "model.safetensors")
    if kind == "missing":
        del weights["model.layers.2.self_attn.o_proj.weight"]
    elif kind == "shape":
        weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    if kind == "truncated":
        raw = (out / "model.safetensors").read_bytes()
        (out / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    elif kind == "config":
        (out / "config.json").unlink()
    elif kind == "family":
        text = (out / "config.json").read_text().replace("glm4_moe_lite", "qwen3_moe")
        (out / "config.json").write_text(text)
    return out


@pytest.mark.parametrize("kind", ["missing", "shape", "truncated", "config", "family"])
def test_bad_weights_leave_the_old_ones_serving(
    engine: Engine, runner: Runner, tiny_dir: Path, other_dir: Path, tmp_path: Path, kind: str
) -> None:
    state = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    result = engine.update_weights(_broken(kind, other_dir, tmp_path / "bad"), version="9").result(WAIT)
    assert not result.success
    assert "\n" not in result.message
    assert engine.weight_version == "0"
    assert all(torch.equal(tensor, state[name]) for name, tensor in runner.model.state_dict().items())
    request = _request(1, 5, max_new_tokens=3)
    _check(load(tiny_dir), request, engine.submit(request).result(WAIT))


def test_weights_of_nan_fail_their_requests_and_leave_no_trace(
    engine: Engine, tiny_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(other_dir, tmp_path / "nan")
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(
        tmp_path / "nan" / "model.safetensors").items()}  # fmt: skip
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    assert engine.update_weights(tmp_path / "nan", version="nan").result(WAIT).success
    with pytest.raises(RequestError, match="not finite") as caught:
        engine.submit(_request(1, 30, max_new_tokens=3)).result(WAIT)
    assert caught.value.status == 500
    assert engine.update_weights(tiny_dir, version="0").result(WAIT).success
    request = _request(1, 5, max_new_tokens=20, ignore_eos=True)
    _check(load(tiny_dir), request, engine.submit(request).result(WAIT))


def test_a_step_that_fails_fails_its_requests_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", lambda *a, **k: 1 / 0)
        with pytest.raises(RequestError, match="division by zero"):
            engine.submit(_request(1, 5, max_new_tokens=3)).result(WAIT)
    assert len(engine.submit(_request(1, 5, max_new_tokens=3)).result(WAIT).output_ids) == 3


def test_models_that_cannot_be_served(tmp_path: Path, tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match="no directory"):
        Runner(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        Runner(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    with pytest.raises(ModelError, match="not a mixture-of-experts"):
        Runner(tmp_path)
    shutil.copytree(tiny_dir, tmp_path / "tiny")
    text = (tmp_path / "tiny" / "config.json").read_text()
    (tmp_path / "tiny" / "config.json").write_text(text.replace("{", '{"sliding_window": 16,', 1))
    with pytest.raises(ModelError, match="full attention only"):
        Runner(tmp_path / "tiny")
