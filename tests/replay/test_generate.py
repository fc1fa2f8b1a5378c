"""`generate` of an attached model: as ever outside of a scope, recorded step by step, refused where rows do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pacenote.replay.errors import ScopeError
from pacenote.replay.hf import attach
from tests.replay.test_exact import BATCH, LENGTH, MAIN, foreign, ids

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")

Build = Callable[..., Any]
NEW = 4


def generate(model: Any, tokens: Tensor, new: int = NEW, cache: bool = True) -> Tensor:
    """Prompts and `new` greedy tokens [B, S + new]."""
    out: Tensor = model.generate(
        tokens, max_new_tokens=new, do_sample=False, use_cache=cache, pad_token_id=0, eos_token_id=None
    )
    return out


@pytest.mark.parametrize("family", MAIN)
def test_a_recording_keeps_the_last_step_of_generate(tiny: Build, family: str) -> None:
    """With a cache each step is a pass of its own over one token: the row is that of the last token read."""
    model, tokens = tiny(family), ids()
    plain = generate(model, tokens)
    replay = attach(model)
    with replay.record() as recording:
        out = generate(model, tokens)
    assert torch.equal(out, plain)
    with torch.no_grad(), replay.record() as whole:
        model(input_ids=out[:, :-1], use_cache=False)
    rows = recording.rows()
    assert rows.shape == (BATCH, 1, len(replay.layers), 2)
    assert torch.equal(rows.sort(-1).values, whole.rows()[:, -1:].sort(-1).values)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", MAIN)
def test_a_recorded_generation_replays_in_a_forward_pass(tiny: Build, family: str, cache: bool) -> None:
    """R3 with transformers' own generation as the rollout: rows of prompts, padded on the left, and of answers."""
    model, tokens = tiny(family), ids()
    tokens[0, :3] = 0
    seen = (torch.arange(LENGTH) >= torch.tensor([[3], [0]])).long()
    replay = attach(model)
    with replay.record_generation() as recording:
        out = model.generate(
            tokens, attention_mask=seen, max_new_tokens=NEW, do_sample=False, use_cache=cache, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    rows = recording.rows(out)
    assert rows.shape == (BATCH, LENGTH + NEW - 1, len(replay.layers), 2)
    places = torch.cat([seen, torch.ones(BATCH, NEW - 1, dtype=torch.long)], dim=1)
    inputs = {"input_ids": out[:, :-1], "attention_mask": places, "position_ids": (places.cumsum(1) - 1).clamp(0)}
    with torch.no_grad(), replay.record() as whole:
        native = model(**inputs, use_cache=False).logits
    real = places.bool()
    assert torch.equal(rows[real].sort(-1).values, whole.rows()[real].sort(-1).values)
    with torch.no_grad(), replay.rows(rows):
        logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits[real], native[real], atol=2e-5, rtol=0)


def test_a_generation_that_cannot_be_told_is_refused(tiny: Build) -> None:
    model, tokens = tiny(MAIN[0]), ids()
    replay = attach(model)
    with replay.record_generation() as recording:
        out = generate(model, tokens)
    with pytest.raises(ScopeError, match="another at sequence 1, position 3: a generation that reorders"):
        recording.rows(out + (torch.arange(out.shape[1]) == 3) * torch.tensor([[0], [1]]))
    with pytest.raises(ScopeError, match=r"expected tokens \[2, 15 or more\], got \[2, 12\]"):
        recording.rows(tokens)
    half = model(input_ids=tokens[:, :4], use_cache=True).past_key_values
    with pytest.raises(ScopeError, match="a cache of 4 more"), replay.record_generation():
        model(input_ids=tokens[:, 4:], past_key_values=half)
    with pytest.raises(ScopeError, match="got embeddings"), replay.record_generation():
        model(inputs_embeds=model.get_input_embeddings()(tokens))
    with pytest.raises(ScopeError, match="without waiting"), replay.record_generation():
        model.generate(tokens, max_new_tokens=2, do_sample=False, cache_implementation="static", pad_token_id=0)
    with pytest.raises(ScopeError, match="nothing is recorded"), replay.record_generation() as nothing:
        nothing.rows(out)


def test_beam_search_is_found_out(tiny: Build) -> None:
    """Beams change places in the cache, which only the tokens tell."""
    model, tokens = tiny(MAIN[0]), ids()
    replay = attach(model)
    with replay.record_generation() as recording:
        out = model.generate(
            tokens, max_new_tokens=8, num_beams=3, num_return_sequences=3, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    with pytest.raises(ScopeError, match="reorders its cache"):
        recording.rows(out)


@pytest.mark.parametrize(("cache", "got"), [(True, 1), (False, LENGTH + 1)])
@pytest.mark.parametrize("family", MAIN)
def test_rows_of_the_prompt_do_not_fit_the_second_step(tiny: Build, family: str, cache: bool, got: int) -> None:
    model, tokens = tiny(family), ids()
    plain = generate(model, tokens)
    replay = attach(model)
    rows = foreign(len(replay.layers))
    with replay.rows(rows):
        generate(model, tokens, new=1, cache=cache)  # one pass, over the prompt
    with pytest.raises(ScopeError, match=rf"input \[2, 12\] as the rows have, got \[2, {got}\]"), replay.rows(rows):
        generate(model, tokens, cache=cache)
    assert torch.equal(generate(model, tokens), plain)  # the failure left nothing behind
    assert replay.audit()["replayed"].tolist() == [2 * BATCH * LENGTH] * len(replay.layers)


@pytest.mark.parametrize(("cache", "after"), [("dynamic", "1"), ("static", "an unread number")])
@pytest.mark.parametrize("family", MAIN)
def test_a_prompt_of_one_token_does_not_lend_its_rows_to_later_steps(
    tiny: Build, family: str, cache: str, after: str
) -> None:
    """Every step's input is [B, 1] then; only the cache tells them apart."""
    model, tokens = tiny(family), ids(length=1)
    replay = attach(model)
    rows = foreign(len(replay.layers), length=1)
    with pytest.raises(ScopeError, match=f"after 0 cached ones, got one after {after}"), replay.rows(rows):
        model.generate(tokens, max_new_tokens=NEW, do_sample=False, cache_implementation=cache, pad_token_id=0)


@pytest.mark.parametrize("family", MAIN)
def test_steps_with_a_cache_replay_in_scopes_of_their_own(tiny: Build, family: str) -> None:
    model, tokens, half = tiny(family), ids(), LENGTH // 2
    replay = attach(model)
    rows = foreign(len(replay.layers))
    with torch.no_grad(), replay.rows(rows):
        whole = model(input_ids=tokens, use_cache=False).logits
    cache, parts = None, []
    for part in (slice(0, half), slice(half, LENGTH)):
        with torch.no_grad(), replay.rows(rows[:, part]):
            out = model(input_ids=tokens[:, part], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)
