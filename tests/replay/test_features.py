"""Every feature with every named family, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.hf import attach
from pacenote.replay.packing import BOUND, check_packing, leak
from pacenote.replay.spec import families
from tests.replay.features import FEATURES, LIMITS, NAMED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", NAMED)
def test_the_feature_holds_under_replay(tiny: Callable[..., Any], family: str, feature: str) -> None:
    if (feature, family) in LIMITS:
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            FEATURES[feature](tiny(family), False)  # the limit is the model's own
    else:
        FEATURES[feature](tiny(family), True)


@pytest.mark.parametrize("family", NAMED)
def test_models_that_do_not_keep_packed_sequences_apart_are_found(tiny: Callable[..., Any], family: str) -> None:
    model = tiny(family).train()
    replay = attach(model)
    if ("packed sequences", family) in LIMITS:
        with pytest.raises(UnsupportedModel, match="keeps packed sequences apart"):
            check_packing(replay, model)
    else:
        check_packing(replay, model)
        half = tiny(family, dtype=torch.bfloat16)
        assert leak(attach(half), half) < BOUND / 2  # rounding alone
    assert model.training


def test_named_families_are_supported() -> None:
    assert set(NAMED) <= set(families())
