"""The training step on recorded routes of a bfloat16 engine, without servers: what replay closes, what breaks it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pacenote.kernels.policy import PolicyConfig
from pacenote.kernels.policy_config import Normalize
from pacenote.kernels.spec import MISSING, PROVENANCES, RECOMPUTED, REPLAY
from pacenote.replay.audit import by_provenance, by_role, by_staleness, by_turn, flips, split, token_flips
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import checkpoint
from pacenote.trainer.batch import Microbatch, microbatches
from pacenote.trainer.errors import NotFinite
from pacenote.trainer.gap import Gap
from pacenote.trainer.guard import Guard, GuardConfig, Reason
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.step import ReplayMode, prepare, update
from tests.replay.conftest import build
from tests.trainer.recorded import COUNT, LENGTH, PROMPT, samples


@pytest.fixture
def backend(tiny_dir: Path) -> HfBackend:
    return HfBackend(tiny_dir, OptimConfig(microbatch_tokens=90), device="cpu", temperature=1.0)


def gap_of(backend: HfBackend, trajectories: list[Trajectory], mode: ReplayMode = "rollout") -> Gap:
    return prepare(backend, [microbatches(samples(trajectories), backend.config, "cpu")], mode)[1]


def test_replay_closes_the_gap(backend: HfBackend, trajectories: list[Trajectory]) -> None:
    gap = gap_of(backend, trajectories)
    assert gap.flips is not None
    assert gap.flips.flipped > 0, "nothing flips, so the comparison would say nothing"
    assert gap.trained.mean_abs < 0.5 * gap.native.mean_abs
    assert gap.trained.k3 < 0.2 * gap.native.k3
    assert gap.trained.tokens == COUNT * (LENGTH - PROMPT)
    assert gap.missing == 0


def test_rows_shifted_by_one_are_visibly_worse(backend: HfBackend, trajectories: list[Trajectory]) -> None:
    shifted = [replace(t, experts=np.concatenate([t.experts[:1], t.experts[:-1]])) for t in trajectories]  # type: ignore[index]
    right, wrong = gap_of(backend, trajectories), gap_of(backend, shifted)
    assert wrong.trained.mean_abs > 3 * wrong.native.mean_abs
    assert wrong.trained.mean_abs > 10 * right.trained.mean_abs


@pytest.mark.parametrize("mode", ["off", "trainer"])
def test_other_modes_leave_the_gap(backend: HfBackend, trajectories: list[Trajectory], mode: ReplayMode) -> None:
    gap = gap_of(backend, trajectories, mode)
    assert gap.trained == gap.native


def test_mixed_replays_the_engine_first_and_the_trainer_later(
    backend: HfBackend, trajectories: list[Trajectory]
) -> None:
    steps = [
        microbatches(part, backend.config, "cpu") for part in (samples(trajectories[:8]), samples(trajectories[8:]))
    ]
    mixed, rollout, own = (routes_of(backend, steps, mode) for mode in ("mixed", "rollout", "trainer"))
    assert torch.equal(mixed[0], rollout[0])
    assert torch.equal(mixed[1], own[1])
    assert not torch.equal(rollout[1], own[1]), "nothing flips, so the comparison would say nothing"


def routes_of(backend: HfBackend, steps: list[list[Microbatch]], mode: ReplayMode) -> list[torch.Tensor]:
    """Rows [T, L, K] that each optimizer step replays."""
    routes = [[item.routes for item in step] for step in prepare(backend, steps, mode)[0]]
    return [torch.cat([r.rows.long() for r in step if r is not None]) for step in routes]


def test_without_a_comparison_there_is_one_pass_less(
    backend: HfBackend, trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gap under replay is as it was, and so is what the update gets; the native one is unknown and not zero."""
    lost = [replace(trajectories[0], provenance=np.full(LENGTH - 1, MISSING, dtype=np.uint8)), *trajectories[1:]]
    steps = [microbatches(samples(lost), backend.config, "cpu")]
    ready, both = prepare(backend, steps, "rollout")
    monkeypatch.setattr(backend, "score_native", None)
    alone, one = prepare(backend, steps, "rollout", compare=False)
    assert one.trained == both.trained
    assert (one.native.tokens, one.flips, one.missing) == (0, None, both.missing)
    assert math.isnan(one.native.mean_abs)
    assert one.groups["role"]["response"].trained == both.groups["role"]["response"].trained
    for left, right in zip(ready[0], alone[0], strict=True):
        assert left.batch.old_logprobs is not None
        assert torch.equal(left.batch.old_logprobs, right.batch.old_logprobs)  # type: ignore[arg-type]


def test_missing_rows_are_counted_and_routed_freely(backend: HfBackend, trajectories: list[Trajectory]) -> None:
    lost = [replace(t, provenance=np.full(LENGTH - 1, MISSING, dtype=np.uint8)) for t in trajectories]
    gap = gap_of(backend, lost)
    assert gap.missing == COUNT * (LENGTH - 1)
    assert gap.trained.mean_abs == pytest.approx(gap.native.mean_abs, rel=1e-3)
    backend.audit()
    half = lost[: COUNT // 2] + trajectories[COUNT // 2 :]
    gap = gap_of(backend, half)
    audit = backend.audit()
    assert gap.missing * len(audit.layers) == audit.total("free") == audit.total("replayed")


def test_rows_of_another_version_are_not_replayed(backend: HfBackend, trajectories: list[Trajectory]) -> None:
    version = np.zeros(LENGTH, dtype=np.int32)
    version[:PROMPT] = 3
    assert gap_of(backend, [replace(t, version=version) for t in trajectories]).missing == COUNT * PROMPT


def test_the_provenance_of_rows_decides_what_trains(backend: HfBackend, trajectories: list[Trajectory]) -> None:
    """The first sample's rows are all recomputed, and one row of the second is."""
    codes = [trajectories[0].provenance * 0 + RECOMPUTED, trajectories[1].provenance.copy()]
    codes[1][LENGTH - 2] = RECOMPUTED
    changed = [replace(t, provenance=code) for t, code in zip(trajectories[:2], codes, strict=True)]

    def packed(config: OptimConfig) -> tuple[int, int]:
        batches = [item.batch for item in microbatches(samples(changed), config, "cpu")]
        routes = [batch.routes for batch in batches if batch.routes is not None]
        return sum(int(b.loss_mask.sum()) for b in batches), sum(int((r.state == REPLAY).sum()) for r in routes)

    trained, rows = LENGTH - PROMPT, LENGTH - 1
    config = OptimConfig()
    assert packed(config) == (2 * trained, rows - 1)
    assert packed(replace(config, mask_provenance=("recomputed",))) == (trained - 1, rows - 1)
    assert packed(replace(config, replay_provenance=PROVENANCES)) == (2 * trained, 2 * rows)
    with pytest.raises(ValueError, match=r"optim\.mask_provenance expects names among missing, .*, got decoded"):
        packed(replace(config, mask_provenance=("decoded",)))  # type: ignore[arg-type]


def test_the_gap_splits_by_what_a_batch_and_its_trajectories_know(
    backend: HfBackend, trajectories: list[Trajectory]
) -> None:
    """One batch of all, and many of a few, give the figures that `split` has from the arrays of one batch."""
    mixed = [replace(t, version=t.version + i % 3) for i, t in enumerate(trajectories)]
    item = microbatches(samples(mixed), replace(backend.config, microbatch_tokens=10_000), "cpu")[0]
    batch = item.batch
    whole = prepare(backend, [microbatches(samples(mixed), backend.config, "cpu")], "rollout", version=2)[1]
    assert batch.routes is not None
    assert whole.flips is not None
    native, own = backend.score_native(batch)
    compared = batch.routes.state == REPLAY
    differs = token_flips(batch.routes.rows, own.rows, compared)
    again = flips(batch.routes.rows, own.rows, compared)
    assert whole.flips.any_layer == pytest.approx(again.any_layer)
    assert whole.flips.flipped_by_layer == pytest.approx(again.flipped_by_layer)
    assert whole.flips.overlap_by_layer == pytest.approx(again.overlap_by_layer)
    kept = [mixed[number] for number in batch.kept]
    assert [t.tokens.tolist() for t in item.trajectories] == [t.tokens.tolist() for t in kept]
    assert list(whole.groups["staleness"]) == ["lag 0", "lag 1", "lag 2"]
    for kind, labels in {
        "role": by_role(batch.loss_mask),
        "turn": by_turn(batch.loss_mask, batch.segment_ids),
        "staleness": by_staleness(np.concatenate([t.version[1:] for t in kept]), 2),
        "provenance": by_provenance(np.concatenate([t.provenance for t in kept])),
    }.items():
        parts = split(native, batch.logprobs, batch.loss_mask, labels, flipped=differs)
        found = whole.groups[kind]
        assert set(found) <= set(parts)
        for name, part in found.items():
            assert part.native.tokens == parts[name].mismatch.tokens
            assert part.native.mean_abs == pytest.approx(parts[name].mismatch.mean_abs, rel=1e-4, nan_ok=True)
            assert part.compared == parts[name].compared
            assert part.flipped == pytest.approx(parts[name].flipped)
        weights = [(p.trained.mean_abs, p.trained.tokens) for p in found.values() if p.trained.tokens]
        assert sum(mean * n for mean, n in weights) == pytest.approx(whole.trained.mean_abs * whole.trained.tokens)
        assert sum(p.compared for p in found.values()) == whole.flips.tokens


def test_a_cut_trajectory_stays_aligned(backend: HfBackend, trajectories: list[Trajectory]) -> None:
    config = replace(backend.config, max_len=LENGTH - 3)
    items = microbatches(samples(trajectories), config, "cpu")
    _, gap = prepare(backend, [items], "rollout")
    assert all(len(t) == LENGTH - 3 for item in items for t in item.trajectories)
    assert gap.trained.tokens == COUNT * (LENGTH - 3 - PROMPT)
    assert gap.groups["provenance"]["decode"].trained.tokens == COUNT * (LENGTH - 4 - PROMPT)


def test_a_model_that_mixes_packed_samples_is_refused(tmp_path: Path) -> None:
    build("gpt_oss").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="keeps packed sequences apart"):
        HfBackend(tmp_path, OptimConfig(), device="cpu", temperature=1.0)


def test_an_empty_step_has_no_gap(backend: HfBackend) -> None:
    gap = prepare(backend, [], "rollout")[1]
    assert (gap.trained.tokens, gap.flips, gap.missing, gap.groups) == (0, None, 0, {})


def gradients(
    backend: HfBackend, trajectories: list[Trajectory], tokens: int, config: PolicyConfig
) -> list[torch.Tensor]:
    """Gradients of one optimizer step that is cut into microbatches of `tokens` positions."""
    batches = microbatches(samples(trajectories), replace(backend.config, microbatch_tokens=tokens), "cpu")
    prepared, _ = prepare(backend, [batches], "rollout")
    kept: list[torch.Tensor] = []

    def capture(*, loss: float = 0.0) -> tuple[float, Reason | None]:
        kept.extend(p.grad.clone() for p in backend.model.parameters() if p.grad is not None)
        backend.optimizer.zero_grad()
        return 1.0, None

    backend.apply_gradients = capture  # type: ignore[method-assign]
    said = update(backend, prepared, config, answer_tokens=LENGTH)
    assert said["tokens"] == sum(t.trained for t in trajectories)
    assert said["samples"] == COUNT
    kept.append(torch.tensor(said["loss"]))
    return kept


@pytest.mark.parametrize("normalize", ["token", "sequence", "group", "constant"])
def test_microbatching_changes_neither_gradient_nor_loss(
    backend: HfBackend, trajectories: list[Trajectory], normalize: Normalize
) -> None:
    uneven = [t.truncate(LENGTH - i % 5) for i, t in enumerate(trajectories)]
    config = PolicyConfig(entropy_coef=0.01, normalize=normalize)
    one, many = gradients(backend, uneven, 10_000, config), gradients(backend, uneven, 40, config)
    largest = max(float(g.abs().max()) for g in one)
    assert len(one) == len(many) > 10
    assert max(float((a - b).abs().max()) for a, b in zip(one, many, strict=True)) < 1e-4 * largest


def test_update_moves_the_weights_and_reports(backend: HfBackend, trajectories: list[Trajectory]) -> None:
    before = [p.detach().clone() for p in backend.model.parameters()]
    prepared, _ = prepare(backend, [microbatches(samples(trajectories), backend.config, "cpu")], "rollout")
    backend.audit()
    said = update(backend, prepared, PolicyConfig(entropy_coef=0.01))
    assert said["ratio_mean"] == pytest.approx(1.0, abs=1e-4), "the first update starts from the old policy"
    assert said["grad_norm"] > 0
    assert 0.9 < said["tis_mean"] < 1.1
    assert said["entropy"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, backend.model.parameters(), strict=True))
    assert backend.audit().total("replayed") == COUNT * (LENGTH - 1) * len(backend.replay.layers)


def test_the_kl_is_to_the_reference_under_the_same_routes(
    backend: HfBackend, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    backend.save_weights(tmp_path)
    reference = HfBackend(tmp_path, backend.config, device="cpu", temperature=1.0)
    steps = [microbatches(samples(trajectories), backend.config, "cpu")]
    config = PolicyConfig(kl_coef=0.5, kl_type="k3")
    prepared, _ = prepare(backend, steps, "rollout", reference=reference)
    assert update(backend, prepared, config)["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    prepared, _ = prepare(backend, steps, "rollout", reference=reference)
    said = update(backend, prepared, config)
    gaps = []
    for item in prepared[0]:
        assert item.reference is not None
        assert item.batch.old_logprobs is not None
        gaps.append((item.reference - item.batch.old_logprobs)[item.batch.loss_mask].double())
    gap = torch.cat(gaps)
    assert said["kl_reference"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-3)
    assert said["kl_reference"] > 0
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in reference.model.parameters())
    reference.close()


def test_nan_never_touches_the_weights(backend: HfBackend, trajectories: list[Trajectory]) -> None:
    prepared, _ = prepare(backend, [microbatches(samples(trajectories), backend.config, "cpu")], "rollout")
    before = [p.detach().clone() for p in backend.model.parameters()]
    poisoned = prepared[0][0]
    advantages = torch.full_like(poisoned.batch.advantages, float("nan"))
    prepared[0][0] = replace(poisoned, batch=replace(poisoned.batch, advantages=advantages))
    said = update(backend, prepared, PolicyConfig())
    assert (said["steps_taken"], said["skipped_not_finite"], said["skipped_spike"]) == (0, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, backend.model.parameters(), strict=True))
    assert all(p.grad is None for p in backend.model.parameters())
    backend.guard = Guard(GuardConfig(max_skips=0))
    with pytest.raises(NotFinite, match=r"1 optimizer steps in a row were skipped, .* of nan \(not_finite\)"):
        update(backend, prepared, PolicyConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, backend.model.parameters(), strict=True))


def test_checkpoint_round_trip(backend: HfBackend, trajectories: list[Trajectory], tmp_path: Path) -> None:
    """A restored run takes the same next step, bit for bit."""
    steps = [microbatches(samples(trajectories), backend.config, "cpu")]
    update(backend, prepare(backend, steps, "rollout")[0], PolicyConfig())
    path = checkpoint.save(tmp_path, backend, step=1, keep=2)
    assert checkpoint.latest(tmp_path) == (1, path)
    other = HfBackend(path / "model", backend.config, device="cpu", temperature=1.0)
    checkpoint.restore(path, other)
    for one in (backend, other):
        update(one, prepare(one, steps, "rollout")[0], PolicyConfig())
    pairs = zip(backend.model.state_dict().items(), other.model.state_dict().values(), strict=True)
    assert not [name for (name, a), b in pairs if not torch.equal(a, b)]


def test_checkpoints_are_whole_or_absent(backend: HfBackend, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.latest(tmp_path)
    (tmp_path / "step_000009").mkdir()  # a crash before the rename leaves no such folder; a foreign one has no state
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, backend, step=step, keep=2)
    assert checkpoint.list_steps(tmp_path) == [2, 3]
    assert not list(tmp_path.glob(".*.part"))
