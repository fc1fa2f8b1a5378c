"""Low-rank adapters: what trains, what is exported, and what a checkpoint brings back."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pacenote.kernels.policy import PolicyConfig
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import checkpoint, lora, plan
from pacenote.trainer.backend import Prepared
from pacenote.trainer.batch import Microbatch, microbatches
from pacenote.trainer.config import RunConfig, dump, parse
from pacenote.trainer.flops import Flops
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.loop import resume, train
from pacenote.trainer.lora import LoraConfig
from pacenote.trainer.model import TinyShape, tiny_config
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.recipes import tiny
from pacenote.trainer.step import prepare, update
from tests.replay.conftest import build
from tests.replay.spawn import spawn
from tests.trainer.ranks import ADAPTED, reference
from tests.trainer.recorded import samples

pytest.importorskip("peft", reason="peft is missing: pip install pacenote[lora]")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
DENSE, ALL = LoraConfig(rank=4), LoraConfig(rank=4, alpha=6.0, targets=(*lora.PROJECTIONS, *EXPERTS))
OPTIM = OptimConfig(lr=1e-2, warmup=1, microbatch_tokens=90)
BOTH = pytest.mark.parametrize("config", [DENSE, ALL], ids=["dense", "experts"])


def open_backend(directory: Path, config: LoraConfig, optim: OptimConfig = OPTIM) -> HfBackend:
    return HfBackend(directory, optim, device="cpu", temperature=1.0, lora=config, seed=3)


def packed(backend: HfBackend, trajectories: list[Trajectory]) -> list[list[Microbatch]]:
    return [microbatches(samples(trajectories), backend.config, "cpu")]


def learn(backend: HfBackend, trajectories: list[Trajectory], steps: int) -> list[dict[str, Any]]:
    """What each of some training steps on the same samples said."""
    said = []
    for _ in range(steps):
        prepared, _ = prepare(backend, packed(backend, trajectories), "rollout")
        said.append(update(backend, prepared, PolicyConfig()))
    return said


def scored(backend: HfBackend, trajectories: list[Trajectory]) -> torch.Tensor:
    """Logprobs under the engine's routes."""
    items = packed(backend, trajectories)[0]
    return torch.cat(backend.scores(items, [item.seen.routes for item in items]))


def state(backend: HfBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def exported(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@BOTH
def test_fresh_adapters_change_nothing(tiny_dir: Path, trajectories: list[Trajectory], config: LoraConfig) -> None:
    before = torch.get_rng_state()
    adapted, plain = open_backend(tiny_dir, config), open_backend(tiny_dir, lora.ALL_WEIGHTS)
    assert torch.equal(before, torch.get_rng_state())
    assert type(adapted.model) is type(plain.model)
    assert torch.equal(scored(adapted, trajectories), scored(plain, trajectories))
    names = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert names == {name for adapter in adapted.adapters.all for name in (adapter.a, adapter.b)}  # type: ignore[union-attr]
    assert any(float(tensor.abs().max()) > 0 for name, tensor in state(adapted).items() if "lora_A" in name)
    again = open_backend(tiny_dir, config)
    assert same(state(adapted), state(again))


def test_what_is_adapted(tiny_dir: Path) -> None:
    """By default attention, the dense MLP and shared experts; routed experts if named; no router, no head."""

    def kinds(config: LoraConfig) -> set[str]:
        adapters = open_backend(tiny_dir, config).adapters
        assert adapters is not None
        return {re.sub(r".*layers\.(\d+)\.", lambda m: "0." if m[1] == "0" else "", a.plain) for a in adapters.all}

    attention = {f"self_attn.{name}.weight" for name in lora.PROJECTIONS[3:8]}
    shared = {f"mlp.shared_experts.{name}.weight" for name in lora.PROJECTIONS[-3:]}
    dense = {f"0.mlp.{name}.weight" for name in lora.PROJECTIONS[-3:]} | {f"0.{name}" for name in attention}
    assert kinds(DENSE) == attention | shared | dense
    assert kinds(ALL) == attention | shared | dense | {f"mlp.{name}" for name in EXPERTS}
    assert kinds(LoraConfig(rank=1, targets=("o_proj",))) == {"self_attn.o_proj.weight", "0.self_attn.o_proj.weight"}


@BOTH
def test_only_adapters_learn_and_the_loss_falls(
    tiny_dir: Path, trajectories: list[Trajectory], config: LoraConfig
) -> None:
    backend = open_backend(tiny_dir, config)
    before = state(backend)
    items = prepare(backend, packed(backend, trajectories), "rollout")[0]

    def loss() -> float:
        """On the fixed batch, with its first old logprobs."""
        return sum(_loss(backend, item) for item in items[0])

    first = loss()
    said = [update(backend, items, PolicyConfig())]
    assert loss() < first
    said += learn(backend, trajectories, 2)
    assert all(one["grad_norm"] > 0 and one["steps_taken"] == 1 for one in said)
    changed = {name for name, tensor in state(backend).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def _loss(backend: HfBackend, item: Prepared) -> float:
    with torch.no_grad(), backend.routed(item.routes):
        return backend.loss(item.batch, PolicyConfig(), denominator=100.0).read()["loss"]


@BOTH
def test_the_export_is_merged_under_the_models_own_names(
    tiny_dir: Path, trajectories: list[Trajectory], tmp_path: Path, config: LoraConfig
) -> None:
    backend = open_backend(tiny_dir, config)
    learn(backend, trajectories, 3)
    before = state(backend)
    backend.save_weights(tmp_path)
    sent = dict(backend.tensors())
    assert same(before, state(backend))

    found, start = exported(tmp_path), exported(tiny_dir)
    assert found.keys() == start.keys()
    assert same(found, sent)
    scale = 2.0 if config.alpha is None else 1.5
    part = "model.layers.1.mlp.shared_experts.up_proj"
    delta = before[f"{part}.lora_B.default.weight"] @ before[f"{part}.lora_A.default.weight"]
    assert float(delta.abs().max()) > 0
    torch.testing.assert_close(found[f"{part}.weight"], start[f"{part}.weight"] + scale * delta)
    assert torch.equal(found["model.layers.1.mlp.gate.weight"], start["model.layers.1.mlp.gate.weight"])
    expert = "model.layers.1.mlp.experts.5.down_proj.weight"
    if config is ALL:  # peft lays A out by expert and rank, B by rank and expert
        a, b = (_down_factor(before, "model.layers.1.mlp.experts", end) for end in "AB")
        added = b.reshape(len(b), -1, 16)[..., 5] @ a.reshape(16, -1, a.shape[-1])[5]
        assert float(added.abs().max()) > 0
        torch.testing.assert_close(found[expert], start[expert] + scale * added)
    else:
        assert torch.equal(found[expert], start[expert])

    loaded, mine = open_backend(tmp_path, lora.ALL_WEIGHTS), scored(backend, trajectories)
    assert float((scored(loaded, trajectories) - mine).abs().max()) < 1e-4
    assert float((scored(open_backend(tiny_dir, lora.ALL_WEIGHTS), trajectories) - mine).abs().max()) > 1e-2


def _down_factor(found: dict[str, torch.Tensor], module: str, which: str) -> torch.Tensor:
    """A or B of the experts' down_proj: of the two wrappers the one whose sizes are the weight's, [., I] and [O, .]."""
    inner, outer = 32, 64  # of down_proj: the expert's, and the model's
    names = [name for name in found if name.startswith(module) and name.endswith(f"lora_{which}.default.weight")]
    assert len(names) == 2
    if which == "A":
        return next(found[name] for name in names if found[name].shape[1] == inner)
    a = next(name for name in names if found[name.replace("lora_B", "lora_A")].shape[1] == inner)
    assert len(found[a]) == outer
    return found[a]


@BOTH
def test_a_resumed_run_takes_the_same_next_step(
    tiny_dir: Path, trajectories: list[Trajectory], tmp_path: Path, config: LoraConfig
) -> None:
    """Bit for bit, though the checkpoint's model is merged."""
    backend = open_backend(tiny_dir, config)
    learn(backend, trajectories, 2)
    path = checkpoint.save(tmp_path, backend, step=2, keep=1)
    assert exported(path / "model").keys() == exported(tiny_dir).keys()
    other = open_backend(path / "model", config)
    assert not same(state(other), state(backend))
    checkpoint.restore(path, other)
    assert same(state(other), state(backend))
    assert learn(backend, trajectories, 1) == learn(other, trajectories, 1)
    assert same(state(other), state(backend))


def test_a_checkpoint_of_other_adapters_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, open_backend(tiny_dir, lora.ALL_WEIGHTS), step=1, keep=1)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.restore(path, open_backend(path / "model", DENSE))
    path = checkpoint.save(tmp_path, open_backend(tiny_dir, replace(DENSE, rank=1)), step=2, keep=1)
    with pytest.raises(ValueError, match=r"cannot be read .*size mismatch"):
        checkpoint.restore(path, open_backend(path / "model", DENSE))


@BOTH
def test_recomputed_layers_learn_the_same(tiny_dir: Path, trajectories: list[Trajectory], config: LoraConfig) -> None:
    one, other = (open_backend(tiny_dir, config, replace(OPTIM, recompute=recompute)) for recompute in (False, True))
    for backend in (one, other):
        learn(backend, trajectories, 2)
    assert all(torch.equal(tensor, state(other)[name]) for name, tensor in state(one).items())


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "qwen3_next"])
def test_peft_translates_no_names(family: str) -> None:
    """It would take `gate_proj` of these families for routed experts, where it sees their config."""
    model = build(family)
    adapters = lora.Adapters(model, DENSE, seed=0)
    assert not [adapter.plain for adapter in adapters.all if adapter.experts or "gate.weight" in adapter.plain]
    assert adapters.merged(model.state_dict()).keys() == build(family).state_dict().keys()


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_merged_weights_compute_the_same(family: str) -> None:
    """Also where experts are stored the other way round, as gpt_oss does."""
    adapted, plain = build(family), build(family)
    adapters = lora.Adapters(adapted, ALL, seed=0)
    assert {adapter.transposed for adapter in adapters.all if adapter.experts} == {family == "gpt_oss"}
    with torch.no_grad():
        for adapter in adapters.all:
            adapted.get_parameter(adapter.b).normal_(std=0.1, generator=torch.Generator().manual_seed(len(adapter.b)))
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start = plain(input_ids=tokens).logits
        plain.load_state_dict(adapters.merged(adapted.state_dict()))
        mine, merged = adapted(input_ids=tokens).logits, plain(input_ids=tokens).logits
    torch.testing.assert_close(mine, merged, rtol=1e-4, atol=1e-5)
    assert float((start - mine).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("gate",), r"expects no router, got 'gate', the name of model\.layers\.1\.mlp\.gate"),
        (("q_a_proj", "gate.weight"), r"expects no router, got 'gate\.weight'"),
        (("lm_head",), r"expects linear layers of the decoder, here down_proj, .*, got 'lm_head'$"),
        (("experts",), r"got 'experts', the name of model\.layers\.1\.mlp\.experts$"),
        (("q_a_layernorm",), r"got 'q_a_layernorm', the name of"),
        (("o_proj.weight",), r"got 'o_proj\.weight', the name of"),
        (("in_proj_z",), r"got none of them"),
    ],
)
def test_targets_that_cannot_be_adapted(tiny_dir: Path, targets: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=rf"--lora\.targets .*{said}"):
        open_backend(tiny_dir, LoraConfig(rank=2, targets=targets))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": -1}, "--lora.rank expects at least 0, got -1"),
        ({"rank": 2, "alpha": 0.0}, "--lora.alpha expects a number above 0"),
        ({"rank": 2, "targets": ()}, "--lora.targets expects at least one name"),
    ],
)
def test_values_that_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoraConfig(**fields)


def test_a_run_refuses_what_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"--lora\.rank expects --backend hf, got megatron"):
        RunConfig(recipe="tiny", backend="megatron", lora=DENSE)
    with pytest.raises(ValueError, match=r"--exact expects --lora\.rank 0, got 4"):
        RunConfig(recipe="tiny", exact=True, threads=1, lora=DENSE)
    with pytest.raises(ValueError, match=r"leave out --lora\.rank"):
        plan.plan(tiny_config(TinyShape()), replace(tiny(), lora=DENSE), world=1)


def test_without_peft_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    config = replace(tiny(), lora=DENSE, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"--lora\.rank expects peft, .* pip install pacenote\[lora\]"):
        train(config)
    assert not (tmp_path / "run").exists()
    tmp_path.joinpath("config.json").write_text(dump(config))
    with pytest.raises(ValueError, match=r"--lora\.rank expects peft"):
        resume(tmp_path)
    lora.check(lora.ALL_WEIGHTS)


def test_it_is_part_of_the_run() -> None:
    config = replace(tiny(), lora=ALL)
    assert parse(dump(config)) == config
    assert (DENSE.scale, ALL.scale) == (2.0, 1.5)
    counted = Flops(token=10, pair=1)
    assert counted.learning([3], frozen=True) == counted.learning([3]) - 30


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case on two processes."""
    return spawn("tests.trainer.ranks", 2, tmp_path_factory.mktemp("two"), ["2", *ADAPTED])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What they are compared with."""
    found: dict[str, Any] = spawn(
        "tests.trainer.ranks", 1, tmp_path_factory.mktemp("one"), ["1", *REFERENCES.values()]
    )[0]
    return found


REFERENCES = {reference(case): name for name, case in ADAPTED.items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ADAPTED)
def test_two_ranks_learn_what_one_does(two: list[dict[str, Any]], one: dict[str, Any], name: str) -> None:
    """Adapters too are sharded: the curve and the merged weights are those of one process, and each rank has a half."""
    wanted, weights, (_, moments) = one[REFERENCES[reference(ADAPTED[name])]]
    for rank in (0, 1):
        rows, _, (_, part) = two[rank][name]
        for got, want in zip(rows, wanted, strict=True):
            for key in ("loss", "grad_norm", "tokens", "gap", "gap_native", "flipped", "rows"):
                assert got[key] == pytest.approx(want[key], rel=2e-4, abs=1e-6)
        assert part == pytest.approx(moments / 2, rel=0.2)  # 3 rows of a factor are 2 and 1
    found: dict[str, torch.Tensor] = two[0][name][1]
    assert found.keys() == weights.keys()
    assert max(float((found[key] - tensor).abs().mean()) for key, tensor in weights.items()) < 2e-5
