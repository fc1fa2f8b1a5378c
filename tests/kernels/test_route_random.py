"""Routing replay on random routers, shapes and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pacenote.kernels import launch
from pacenote.kernels.spec import RouterSpec
from tests.kernels.route_oracle import Inputs, check, random

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (torch.uint8, torch.uint16, torch.int32, torch.int64)


@st.composite
def routers(draw: Any) -> Inputs:
    """Inputs of any router: E = groups x size, K within what the open groups hold."""
    groups = draw(st.sampled_from((1, 1, 2, 3, 8)))
    size = draw(st.integers(1, 40))
    opened = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(12, opened * size)))
    spec = RouterSpec(
        score=draw(st.sampled_from(("softmax", "sigmoid", "softmax_topk"))),
        renormalize=draw(st.booleans()),
        eps=draw(st.sampled_from((0.0, 1e-20, 1e-3))),
        scale=draw(st.sampled_from((1.0, 1.8, 16.0))),
        groups=groups,
        topk_groups=opened,
        group_score=draw(st.sampled_from(("top2", "topk_share", "max"))),
        score_dtype=draw(st.sampled_from(("float32", "logits"))),
        weight_dtype=draw(st.sampled_from(("float32", "logits"))),
    )
    return random(
        spec,
        groups * size,
        k,
        tokens=draw(st.integers(1, 70)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        rows=draw(st.sampled_from(ROWS if groups * size <= 256 else ROWS[1:])),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(
    max_examples=20 if launch.INTERPRETED else 100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(inputs=routers())
def test_any_router(inputs: Inputs, device: torch.device) -> None:
    check(inputs, device)
