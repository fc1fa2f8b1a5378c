"""The library's face, used as the front door's docstring shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import pacenote as pn
from pacenote.kernels.spec import DECODE, PREFILL


def trajectory(tokens: int, seed: int, layers: tuple[int, ...], experts: int, top_k: int) -> pn.Trajectory:
    """A sample whose second half was generated, with random routes."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(tokens) >= tokens // 2).astype(np.uint8)
    rows = rng.random((tokens - 1, len(layers), experts)).argsort(-1)[..., :top_k].astype(np.uint8)
    return pn.Trajectory(
        tokens=rng.integers(0, 400, tokens).astype(np.int32),
        loss_mask=mask,
        logprobs=(-6.0 * mask).astype(np.float32),
        experts=rows,
        provenance=np.where(mask[:-1], DECODE, PREFILL).astype(np.uint8),
        version=np.zeros(tokens, np.int32),
        layers=layers,
        num_experts=experts,
    )


def test_the_front_door_as_documented(tiny_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    replay = pn.attach(model)
    geometry = replay.geometry
    samples = [trajectory(n, n, geometry.layers, geometry.num_experts, geometry.top_k) for n in (2, 9, 33)]
    batch = pn.pack(samples, max_len=20, device="cpu", advantages=[1.0, -1.0, 0.5], pad_to_multiple=16)
    assert (batch.num_tokens, batch.padding) == (32, 32 - (1 + 8 + 19))
    with replay.rows(batch.routes), replay.record() as used:
        hidden = model.model(**batch.inputs).last_hidden_state
        logprob, entropy = pn.linear_logprob(hidden, model.lm_head.weight, batch.targets, temperature=1.0)
        pn.policy_loss(logprob, batch, pn.PolicyConfig(entropy_coef=0.01), entropy=entropy).backward()

    counts = replay.audit()
    layers = len(geometry.layers)
    assert (counts.total("replayed"), counts.total("pad"), counts.total("free")) == (28 * layers, 4 * layers, 0)
    recorded = np.concatenate([sample.experts[: min(len(sample), 20) - 1] for sample in samples])  # type: ignore[index]
    assert np.array_equal(used.rows()[0, :28].numpy(), recorded)
    gates = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    assert len(gates) == layers
    assert all(gate.grad is not None and bool(gate.grad.abs().sum() > 0) for gate in gates), "the routers still learn"
    replay.detach()
