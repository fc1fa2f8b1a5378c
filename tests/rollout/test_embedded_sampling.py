"""Draws and logprobs: distributions, filters, seeds, and what a logprob means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.embedded_request import Request, RequestError, SamplingParams
from pacenote.rollout.embedded_sampling import draw, generator


def _request(number: int = 0, *, stop_ids: frozenset[int] = frozenset(), top: int = 0, **params: Any) -> Request:
    return Request(
        rid=str(number),
        prompt_ids=[1],
        params=SamplingParams(**params),
        stop_ids=stop_ids,
        generator=generator(params.get("seed"), engine_seed=0, number=number),
        top_logprobs=top,
    )


def _counts(logits: list[float], draws: int = 4000, **params: Any) -> np.ndarray[Any, Any]:
    requests = [_request(number, **params) for number in range(draws)]
    result = draw(torch.tensor([logits]).repeat(draws, 1), requests)
    return np.bincount(result.tokens, minlength=len(logits)) / draws


def test_draws_follow_the_tempered_softmax() -> None:
    logits = [0.0, 1.0, 2.0, -torch.inf]
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(torch.tensor(logits) / temperature, -1).numpy()
        assert np.abs(_counts(logits, temperature=temperature) - expected).max() < 0.03


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.7}, {0, 1}),  # the token that crosses the bound stays
        ({"min_p": 0.3}, {0, 1}),
        ({"top_k": 3, "min_p": 0.9}, {0}),
        ({"top_k": 100}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_the_right_tokens(params: dict[str, Any], kept: set[int]) -> None:
    logits = torch.tensor([0.6, 0.25, 0.1, 0.05]).log().tolist()
    counts = _counts(logits, draws=1500, **params)
    assert set(np.flatnonzero(counts)) == kept


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-40, 40), min_size=2, max_size=8),
    st.floats(0.05, 5.0),
    st.floats(0.05, 1.0),
    st.integers(1, 8),
)
def test_logprobs_are_of_the_tempered_distribution_before_filters(
    logits: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    request = _request(temperature=temperature, top_p=top_p, top_k=top_k)
    result = draw(torch.tensor([logits]), [request])
    expected = torch.log_softmax(torch.tensor(logits) / temperature, -1)
    assert result.logprobs[0] == pytest.approx(float(expected[result.tokens[0]]), abs=1e-4)


def test_greedy_takes_the_best_and_reports_temperature_one() -> None:
    result = draw(torch.tensor([[1.0, 3.0, 2.0]]), [_request(temperature=0.0, top_k=1)])
    assert result.tokens == [1]
    assert result.logprobs[0] == pytest.approx(float(torch.log_softmax(torch.tensor([1.0, 3.0, 2.0]), -1)[1]))


def test_a_draw_depends_on_its_request_alone() -> None:
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    alone = [draw(rows[i : i + 1], [_request(seed=i)]).tokens[0] for i in range(6)]
    assert draw(rows, [_request(seed=i) for i in range(6)]).tokens == alone
    mixed = [_request(seed=i, temperature=1.0 if i % 2 else 0.0, top_k=1 if i == 3 else -1) for i in range(6)]
    assert [draw(rows, mixed).tokens[i] for i in (1, 5)] == [alone[1], alone[5]]


def test_bias_stop_mask_and_alternatives() -> None:
    biased = _request(temperature=0.0, logit_bias={2: 50.0}, top=2)
    early = _request(temperature=0.0, min_new_tokens=1, stop_ids=frozenset({0}))
    result = draw(torch.tensor([[5.0, 0.0, 0.0], [5.0, 1.0, 0.0]]), [biased, early])
    assert result.tokens == [2, 1]
    assert result.top[1] == ()
    assert [token for _, token in result.top[0]] == [2, 0]
    assert result.logprobs[0] == pytest.approx(0.0, abs=1e-4)


def test_the_models_own_logits_are_not_written_to() -> None:
    with torch.inference_mode():
        logits = torch.tensor([[5.0, 0.0]])  # as a float32 model gives them: no cast makes a copy
    for params in ({"logit_bias": {1: 50.0}}, {"min_new_tokens": 1}):
        request = _request(temperature=0.0, stop_ids=frozenset({0}), **params)
        assert draw(logits, [request]).tokens == [1]
    assert logits.tolist() == [[5.0, 0.0]]


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_broken_logits_are_reported_and_do_not_spread(bad: list[float]) -> None:
    result = draw(torch.tensor([bad, [0.0, 9.0]]), [_request(0), _request(1, temperature=0.0)])
    assert result.finite == [False, True]
    assert result.tokens[1] == 1


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"top_k": -2},
        {"min_p": -0.1},
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 3, "max_new_tokens": 2},
        {"stop": ("",)},
        {"seed": -1},
        {"logit_bias": {1: math.nan}},
    ],
)
def test_values_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(params))) as caught:
        SamplingParams(**params)
    assert caught.value.status == 400
