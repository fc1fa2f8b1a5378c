"""Routing replay against its definition in plain torch, and against torch.compile of that.

    python -m benchmarks.route --out benchmarks/results

Results are compared with float64 before anything is timed. On a CPU the shapes are small and the timings mean nothing.
`plain` is `reference.replay_topk`, which also finds the router's own choice of every row, as the counts need it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from pacenote.kernels import reference
from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.spec import FREE
from tests.kernels.route_oracle import FAMILIES, Inputs, check

Route = Callable[[Tensor, Inputs], tuple[Tensor, Tensor]]
MODELS = {
    "glm-4.7-flash": (torch.float32, torch.uint8),
    "qwen3": (torch.bfloat16, torch.uint8),
    "deepseek-v3": (torch.float32, torch.uint8),
    "kimi-k2": (torch.float32, torch.uint16),
}
"""Logits and rows as these models' trainers have them: GLM-4.7-Flash, Qwen3-30B-A3B, DeepSeek-V3, Kimi-K2."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed: the forward pass of rows that are replayed or free, counted or not, or forward and backward."""

    name: str
    free: bool = False
    count: bool = False
    backward: bool = False


WORKS = (
    Work("replay"),
    Work("replay, counted", count=True),
    Work("free", free=True),
    Work("replay and backward", backward=True),
)


def make(model: str, tokens: int, seed: int, free: bool, device: torch.device) -> Inputs:
    """Valid rows from a slightly different router, as a rollout engine's are."""
    family, (dtype, ids) = FAMILIES[model], MODELS[model]
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(tokens, family.experts, generator=g, device=device)
    noise = torch.randn(tokens, family.experts, generator=g, device=device)
    bias = torch.randn(family.experts, generator=g, device=device) * 0.1 if family.bias else None
    rows = reference.native_topk(logits + 0.02 * noise, family.k, family.spec, bias)
    state = torch.full((tokens,), FREE, dtype=torch.uint8, device=device) if free else None
    return Inputs(logits.to(dtype), rows.to(ids), family.spec, state, bias)


def floor_bytes(inputs: Inputs, work: Work) -> int:
    """The least that has to be read and written; the launchers of `route_triton` give the formulas."""
    (tokens, experts), k = inputs.logits.shape, inputs.rows.shape[1]
    spec, size = inputs.spec, inputs.logits.element_size()
    whole = spec.score == "softmax"
    weight = reference.weight_dtype(inputs.logits.dtype, spec).itemsize
    chosen = min(32 * k, experts * size)  # single numbers are read in sectors of 32 bytes
    row = experts * size if whole or work.free or work.count else chosen
    total = row + k * (inputs.rows.element_size() + weight + 8)
    if work.backward:
        total += experts * size + (experts * size if whole else chosen) + k * (weight + 8)
    return tokens * total


def ours(logits: Tensor, inputs: Inputs, stats: RouteStats | None = None) -> tuple[Tensor, Tensor]:
    """The op; weights and experts [T, K]."""
    return replay_topk(logits, inputs.rows, inputs.spec, state=inputs.state, bias=inputs.bias, stats=stats)


def plain(logits: Tensor, inputs: Inputs, stats: RouteStats | None = None) -> tuple[Tensor, Tensor]:
    """The definition; weights and experts [T, K]."""
    out = reference.replay_topk(logits, inputs.rows, inputs.spec, state=inputs.state, bias=inputs.bias)
    if stats is not None:
        stats.counters.add_(reference.route_counts(out, inputs.rows))
    return out.weights, out.experts


def call_of(route: Any, inputs: Inputs, work: Work, stats: RouteStats) -> Callable[[], Any]:
    """A call of a route [T, E] -> [T, K] on its inputs."""
    counted = stats if work.count else None
    if not work.backward:
        return torch.no_grad()(partial(route, inputs.logits, inputs, counted))
    leaf = inputs.logits.detach().requires_grad_()
    grad = torch.ones(inputs.rows.shape, device=leaf.device)

    def both() -> Any:
        weights, _ = route(leaf, inputs, counted)
        return torch.autograd.grad(weights, leaf, grad.to(weights.dtype))

    return both


def measure(model: str, tokens: int, device: torch.device, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """Rows of results for a model's shape: every work, every implementation; checked before it is timed."""
    stats, results = RouteStats.zeros(device), []
    for work in WORKS:
        first = make(model, tokens, 0, work.free, device)
        check(first, device)
        count = harness.rotation(first.logits.nbytes + first.rows.nbytes, device)
        inputs = [first, *(make(model, tokens, seed, work.free, device) for seed in range(1, count))]
        routes: dict[str, Any] = {"pacenote": ours, "plain": plain}
        if compiled:
            torch.compiler.reset()
            routes["compiled"] = torch.compile(plain, dynamic=False)
        for name, route in routes.items():
            timing = harness.time_calls([call_of(route, one, work, stats) for one in inputs], device, repeats)
            row = {
                "model": model,
                "tokens": tokens,
                "experts": first.logits.shape[1],
                "k": first.rows.shape[1],
                "logits": str(first.logits.dtype)[6:],
                "rows": str(first.rows.dtype)[6:],
                "work": work.name,
                "implementation": name,
                **timing.row(floor_bytes(first, work)),
            }
            results.append(row)
            floor = f"  floor {row['floor_us']:.1f} us" if timing.on_gpu else ""
            print(
                f"{model:>14} T={tokens:<7} {work.name:<20} {name:<9} {row['median_us']:>10.1f} us "
                f"[{row['p10_us']:.1f}, {row['p90_us']:.1f}]{floor}",
                flush=True,
            )
    return results


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.route", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 8k, 32k and 128k on a GPU, else 256")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, help="default: 50 on a GPU, else 5")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    device = harness.pick_device()
    on_gpu = device.type == "cuda"
    sizes = options.tokens or ([8192, 32768, 131072] if on_gpu else [256])
    facts = harness.machine(device)
    if not on_gpu:
        print(f"No GPU here. {facts['note']}.", flush=True)
    rows = []
    for model in options.models:
        for tokens in sizes:
            # Compiling takes longer than measuring: one size shows what it does.
            compiled = on_gpu and not options.no_compile and tokens == sizes[len(sizes) // 2]
            rows += measure(model, tokens, device, options.repeats or (50 if on_gpu else 5), compiled)
            path = harness.write("route", facts, rows, options.out)  # what is measured stays, if a later size fails
    print(f"written: {path}")


if __name__ == "__main__":
    main()
