"""One rank of a few: back ends in many layouts learn from the same samples, and say what became of them.

python -m tests.trainer.ranks RANK DIRECTORY SIZE CASE...    # from the repository's root, src on PYTHONPATH
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from pacenote.kernels.policy import PolicyConfig
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import checkpoint
from pacenote.trainer import model as models
from pacenote.trainer.backend import Backend
from pacenote.trainer.batch import Sample, share_out
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.lora import ALL_WEIGHTS, PROJECTIONS, LoraConfig
from pacenote.trainer.megatron import MegatronBackend
from pacenote.trainer.megatron_config import MegatronConfig
from pacenote.trainer.model import build_tiny
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.step import ReplayMode, prepare, update
from pacenote.trainer.world import World
from tests.replay.conftest import build
from tests.trainer import recorded

STEPS, LENGTH = 2, recorded.LENGTH
OPTIM = OptimConfig(lr=1e-3, warmup=1, minibatches=2, microbatch_tokens=60, max_len=LENGTH)
TOKEN = PolicyConfig(entropy_coef=0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a back end's layout (None: transformers), the loss, whose routes are replayed, how many samples there
    are, and whether the run is broken off and goes on."""

    family: str = "glm"
    layout: MegatronConfig | None = None
    loss: PolicyConfig = TOKEN
    mode: ReplayMode = "rollout"
    samples: int = recorded.COUNT
    resumed: bool = False
    recompute: bool = False
    lora: LoraConfig = ALL_WEIGHTS


def _megatron(**fields: Any) -> Case:
    return Case(layout=MegatronConfig(**fields))


SEQUENCES = PolicyConfig(ratio="sequence", normalize="sequence", clip_low=3e-4, clip_high=4e-4)
CASES = {
    "hf": Case(),
    "hf_sequences": Case(loss=SEQUENCES),
    "hf_groups": Case(loss=replace(TOKEN, normalize="group")),
    "hf_constant": Case(loss=replace(TOKEN, normalize="constant")),
    "hf_trainer": Case(mode="trainer"),
    "hf_few": Case(samples=5),
    "hf_resumed": Case(resumed=True),
    "ep2": _megatron(expert=2),
    "ep2_bf16": _megatron(expert=2, dtype="bfloat16"),
    "cp2": replace(_megatron(context=2), recompute=True),
    "cp2_sequences": replace(_megatron(context=2), loss=SEQUENCES),
    "cp2_trainer": replace(_megatron(context=2), mode="trainer"),
    "pp2": _megatron(pipeline=2),
    "pp2_vpp3": replace(_megatron(pipeline=2, virtual_pipeline=3, distributed_optimizer=False), recompute=True),
    "hf_recomputed": Case(recompute=True),
    "pp2_trainer": replace(_megatron(pipeline=2), mode="trainer"),
    "dp2_resumed": replace(_megatron(), resumed=True),
    "dp2_few": replace(_megatron(), samples=5),
    "tp2": replace(_megatron(tensor=2), family="qwen"),
    "tp2_etp1": replace(_megatron(tensor=2, expert=2, expert_tensor=1), family="qwen"),
    "tp2_sequences": replace(_megatron(tensor=2), family="qwen", loss=SEQUENCES),
    "hf_deepseek": Case(family="deepseek"),
    "ep2_deepseek": replace(_megatron(expert=2), family="deepseek"),
    "cp2_deepseek": replace(_megatron(context=2), family="deepseek"),
}
DENSE, ALL = (
    LoraConfig(rank=3, targets=(*PROJECTIONS, *more)) for more in ((), ("experts.gate_up_proj", "experts.down_proj"))
)
ADAPTED = {
    "lora": Case(lora=DENSE),
    "lora_resumed": Case(lora=DENSE, resumed=True),
    "lora_experts": Case(lora=ALL, resumed=True),
    "lora_recomputed": Case(lora=ALL, recompute=True),
}
"""With adapters; in test_lora.py."""


_COMMON = {"vocab_size": 512, "num_hidden_layers": 4}
_TYPES = {"qwen": "qwen3_moe", "deepseek": "deepseek_v3"}
_FIELDS: dict[str, dict[str, Any]] = {
    "qwen": {**_COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "deepseek": {**_COMMON, "n_routed_experts": 16, "num_experts_per_tok": 4},
}


@dataclass(slots=True)
class Outcome:
    """Of a case on a rank: metrics by step, as every rank has them, and on the first the weights at the end."""

    rows: list[dict[str, float]] = field(default_factory=list)
    held: tuple[int, int] = (0, 0)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def saved_model(family: str, directory: Path) -> Path:
    """A tiny model directory of the family."""
    out = directory / f"model_{family}"
    if not out.exists():
        if family == "glm":
            return build_tiny(out, seed=0)
        torch.manual_seed(0)
        models.save(build(_TYPES[family], **_FIELDS[family]), out)
    return out


def uneven(trajectories: list[Trajectory], count: int) -> list[Sample]:
    """Of different lengths."""
    cut = [t.truncate(LENGTH - i % 5) for i, t in enumerate(trajectories[:count])]
    return recorded.samples(cut)


def open_backend(case: Case, model: Path, world: World) -> Backend:
    optim = replace(OPTIM, recompute=case.recompute)
    if case.layout is None:
        return HfBackend(model, optim, device="cpu", temperature=0.9, lora=case.lora, seed=1, world=world)
    return MegatronBackend(model, optim, case.layout, device="cpu", temperature=0.9, world=world)


def one_step(backend: Backend, case: Case, samples: list[Sample], step: int) -> dict[str, float]:
    """A training step as the loop takes it."""
    shares = share_out(samples, backend.config, backend.place, seed=step)[backend.place.data_rank]
    packed = [backend.pack(share, samples[0]) for share in shares]
    prepared, gap = prepare(backend, packed, case.mode)
    backend.audit()
    backend.set_lr(step, STEPS)
    said = update(backend, prepared, case.loss, answer_tokens=LENGTH)
    counted = [audit.total("replayed") + audit.total("free") for audit in backend.world.gather(backend.audit())]
    assert gap.flips is not None
    return {
        **said,
        "gap": gap.trained.mean_abs,
        "gap_native": gap.native.mean_abs,
        "flipped": gap.flips.flipped,
        "compared": gap.flips.tokens,
        "rows": sum(counted),
    }


def held(backend: Backend) -> tuple[int, int]:
    """Numbers in this rank's weights, and bytes of its optimizer: moments, and masters of bfloat16 weights."""
    if isinstance(backend, HfBackend):
        local = [p.to_local() if isinstance(p, DTensor) else p for p in backend.model.parameters()]
        states = [backend.optimizer.state[p] for p in backend.trained]
        masters: list[torch.Tensor] = []
    else:
        assert isinstance(backend, MegatronBackend)
        from pacenote.trainer import megatron_optimizer

        local = [p for chunk in backend.models for p in chunk.parameters()]
        inner = megatron_optimizer._inner(backend.optimizer)
        states = [state for one in inner for state in one.state.values()]
        stepped = [p for one in inner for group in one.param_groups for p in group["params"]]
        masters = stepped if backend.layout.dtype == "bfloat16" else []
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    parts = [m.to_local() if isinstance(m, DTensor) else m for m in (*moments, *masters)]
    return sum(p.numel() for p in local), sum(p.numel() * p.element_size() for p in parts)


def run(case: Case, model: Path, directory: Path, world: World) -> Outcome:
    """Some training steps; a resumed case is saved after the first, and goes on as another back end."""
    samples = uneven(recorded.record(model), case.samples)
    outcome = Outcome()
    backend = open_backend(case, model, world)
    for step in range(STEPS):
        outcome.rows.append(one_step(backend, case, samples, step))
        if case.resumed and step == 0:
            saved = checkpoint.save(directory / "checkpoints", backend, step=1, keep=1)
            backend.close()
            backend = open_backend(case, saved / "model", world)
            checkpoint.restore(saved, backend)
    outcome.held = held(backend)
    backend.save_weights(directory / "model")
    backend.close()
    if world.leads:
        for file in (directory / "model").glob("*.safetensors"):
            outcome.weights |= load_file(file)
    return outcome


def reference(case: Case) -> Case:
    """What a case must equal: transformers, on one process."""
    return replace(case, layout=None, resumed=False, recompute=False)


def refusal(model: Path, world: World) -> str:
    """What is said of latent attention that is cut over tensor ranks by megatron-core's own layers."""
    try:
        open_backend(_megatron(tensor=2), model, world)
    except ValueError as error:
        return str(error)
    return "built"


def main() -> None:
    """Run every case named on the command line, on one process its reference, and save what came out."""
    rank, directory, size, names = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    with World.join({"RANK": str(rank), "WORLD_SIZE": str(size)}, "cpu") as world:
        for name in names:
            case = {**CASES, **ADAPTED}[name]
            case = case if size > 1 else reference(case)
            folder = directory / name
            model = world.lead(partial(saved_model, case.family, directory))
            outcome = run(case, model, folder, world)
            results[name] = (outcome.rows, outcome.weights, outcome.held)
        if size > 1 and not ADAPTED.keys() & set(names):
            results["refusal"] = refusal(world.lead(partial(saved_model, "glm", directory)), world)
    torch.save(results, directory / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
