"""An exact engine in-process: its logprobs are the trainer's to the last bit, however its requests come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pacenote.replay import exact_ops
from pacenote.replay.exact import Exact
from pacenote.rollout.embedded_config import EngineConfig, parse_arguments
from pacenote.rollout.embedded_engine import Engine
from pacenote.rollout.embedded_model import ModelError, Runner
from pacenote.rollout.embedded_request import Completion, Request, SamplingParams
from pacenote.rollout.embedded_sampling import generator
from pacenote.rollout.launch import engine_command
from pacenote.trainer.model import load

WAIT = 60.0
HEAT = 0.7
SHAPES = [(1, 5), (30, 1), (7, 20), (64, 3), (2, 9), (33, 6), (13, 2), (40, 11)]
"""Tokens of the prompt and of the answer: more requests than there are slots."""

Logprobs = Callable[[Request, Completion], list[float]]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(tiny_dir: Path, dtype: str) -> Iterator[Engine]:
    engine = Engine(Runner(tiny_dir, dtype=dtype, slots=5, context_length=96, exact=True), prefill_tokens=64)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def trainer(tiny_dir: Path, dtype: str) -> Logprobs:
    """Logprobs of an answer from one packed pass over it, with another sequence before it."""
    model = load(tiny_dir, dtype=getattr(torch, dtype)).train()
    exact = Exact(model)

    def logprobs(request: Request, done: Completion) -> list[float]:
        prompt, answer = request.prompt_ids, list(done.output_ids)
        other, ids = list(range(23)), [*prompt, *answer[:-1]]
        places = torch.cat([torch.arange(len(other)), torch.arange(len(ids))])
        with exact.forward():
            hidden = model.base_model(
                input_ids=torch.tensor([[*other, *ids]]), position_ids=places[None], use_cache=False
            ).last_hidden_state[0, -len(answer) :]
        values: list[float] = exact.logprobs(hidden, torch.tensor(answer), HEAT)[0].tolist()
        return values

    return logprobs


def ask(number: int, length: int, **params: Any) -> Request:
    return Request(
        rid=f"r{number}",
        prompt_ids=np.random.default_rng(number).integers(0, 480, size=length).tolist(),
        params=SamplingParams(temperature=HEAT, **params),
        stop_ids=frozenset([485]),
        generator=generator(None, engine_seed=0, number=number),
        record_routes=number % 2 == 0,
    )


def test_a_busy_engine_gives_the_trainers_logprobs(engine: Engine, trainer: Logprobs) -> None:
    requests = [ask(number, length, max_new_tokens=new) for number, (length, new) in enumerate(SHAPES)]
    futures = [engine.submit(request) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        done = future.result(WAIT)
        assert list(done.logprobs) == trainer(request, done)


def test_a_retracted_answer_goes_on_as_if_nothing_had_been(
    engine: Engine, trainer: Logprobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values are computed again, in one piece instead of one by one."""
    decode, paused = engine.runner.decode, Future[None]()

    def retract(tokens: Any, positions: Any, **options: Any) -> Any:
        if positions[0] == 12 and not paused.done():
            engine.pause("retract").add_done_callback(lambda _: paused.set_result(None))
        return decode(tokens, positions, **options)

    monkeypatch.setattr(engine.runner, "decode", retract)
    request = ask(1, 8, max_new_tokens=20)
    future = engine.submit(request)
    paused.result(WAIT)
    engine.resume().result(WAIT)
    done = future.result(WAIT)
    assert done.retractions == 1
    assert list(done.logprobs) == trainer(request, done)


def test_edited_requests_report_the_edited_distribution(engine: Engine, trainer: Logprobs) -> None:
    request = ask(3, 8, max_new_tokens=2, logit_bias={7: 50.0})
    done = engine.submit(request).result(WAIT)
    assert done.output_ids == (7, 7)
    assert max(abs(value) for value in done.logprobs) < 1e-3
    assert max(trainer(request, done)) < -1.0


def test_the_switch_reaches_the_engine(tiny_dir: Path) -> None:
    command = engine_command(tiny_dir, port=1, dtype="float32", exact=True)
    assert parse_arguments(command[3:]).exact
    assert not parse_arguments(engine_command(tiny_dir, port=1)[3:]).exact
    wrongs: list[dict[str, Any]] = [{"device": "cuda"}, {"experts_implementation": "grouped_mm"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="expected device cpu and eager experts"):
            EngineConfig(model_path=tiny_dir, exact=True, **wrong)


def test_a_model_without_an_exact_form_is_refused(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_ops, "FUNCTIONS", exact_ops.FUNCTIONS - {"silu"})
    with pytest.raises(ModelError, match=r"cannot serve .* exactly: .* not to mix tokens, got aten\.silu\.default"):
        Runner(tiny_dir, exact=True)
    Runner(tiny_dir)
