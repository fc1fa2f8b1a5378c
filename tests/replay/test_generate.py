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
