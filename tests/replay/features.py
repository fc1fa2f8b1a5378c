"""What replay is used with, and with which families: each feature is a check that raises where it does not hold.

`test_features` runs every check with every family of NAMED; `table` is the same as text, for docs/replay.md:

    python -m tests.replay.features     # from the repository's root, with src on PYTHONPATH

A cell of LIMITS is one where the model itself cannot do it: there the check must fail without replay, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pacenote.replay.hf import Replay, attach

NAMED = (
    "glm4_moe_lite", "glm4_moe", "deepseek_v3", "glm_moe_dsa", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "qwen3_5_moe_text", "mixtral", "gpt_oss", "minimax_m2", "olmoe", "phimoe", "ernie4_5_moe", "kimi_k2",
)  # fmt: skip
BATCH, LENGTH, NEW, PAD = 2, 10, 3, 4
Check = Callable[[Any, bool], None]


def tokens(batch: int = BATCH) -> Tensor:
    return torch.randint(3, 64, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def rows_of(replay: Replay, batch: int = BATCH) -> Tensor:
    """Valid rows [B, S, L, K] int32 that no router chose."""
    geometry = replay.geometry
    shape = (batch, LENGTH, len(geometry.layers), geometry.num_experts)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., : geometry.top_k].int()


class Runner:
    """A model's forward passes, with given rows replayed or, without replay, as the model routes by itself."""

    def __init__(self, model: Any, replayed: bool) -> None:
        self.model = model
        self.replay = attach(model) if replayed else None

    def rows(self, batch: int = BATCH) -> Tensor | None:
        return None if self.replay is None else rows_of(self.replay, batch)

    def logits(self, rows: Tensor | None, *, call: Any = None, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return self._run(rows, self.model if call is None else call, inputs)

    def gradients(self, rows: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and gradients of one step."""
        self.model.zero_grad()
        logits = self._run(rows, self.model, {"input_ids": tokens()}, backward=True)
        named = self.model.named_parameters()
        return logits.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}

    def _run(self, rows: Tensor | None, call: Any, inputs: dict[str, Any], *, backward: bool = False) -> Tensor:
        def body() -> Tensor:
            logits: Tensor = call(**inputs, use_cache=False).logits
            if backward:
                torch.autograd.backward(logits.float().square().mean())
            return logits

        if self.replay is None:
            return body()
        assert rows is not None
        with self.replay.rows(rows):
            return body()


def same_step(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    assert not [name for name in a[1] if not torch.equal(a[1][name], b[1][name])]


def checkpointing(model: Any, replayed: bool, reentrant: bool) -> None:
    """Gradients of recomputed layers are those of kept ones, to the last bit."""
    run = Runner(model.train(), replayed)
    rows = run.rows()
    plain = run.gradients(rows)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same_step(run.gradients(rows), plain)
    if run.replay is not None:  # recomputation is not counted again
        assert run.replay.audit()["replayed"].tolist() == [2 * BATCH * LENGTH] * len(run.replay.layers)


def compiled(model: Any, replayed: bool) -> None:
    """A compiled model gives the plain one's logits to the last bit, with new rows each time and with none."""
    native = Runner(model, False).logits(None, input_ids=tokens())
    run = Runner(model, replayed)
    torch.compiler.reset()
    call: Any = torch.compile(model, backend="aot_eager")
    rows = run.rows()
    for turn in range(2):
        now = None if rows is None else rows.roll(turn, dims=1)
        assert torch.equal(run.logits(now, call=call, input_ids=tokens()), run.logits(now, input_ids=tokens()))
    if run.replay is not None:
        assert run.replay.audit()["replayed"].tolist() == [4 * BATCH * LENGTH] * len(run.replay.layers)
        assert torch.equal(call(input_ids=tokens(), use_cache=False).logits, native)


def packed(model: Any, replayed: bool) -> None:
    """Two sequences end to end, their positions restarting, give the logits of two apart."""
    run = Runner(model, replayed)
    rows, ids = run.rows(), tokens()
    apart = run.logits(rows, input_ids=ids)
    flat = None if rows is None else rows.flatten(0, 1)
    places = torch.arange(LENGTH).repeat(BATCH)[None]
    together = run.logits(flat, input_ids=ids.view(1, -1), position_ids=places)
    torch.testing.assert_close(together.view_as(apart), apart, atol=2e-5, rtol=0)


def left_padded(model: Any, replayed: bool) -> None:
    """Padding in front, whose rows are free, changes nothing behind it."""
    run = Runner(model, replayed)
    rows, ids = run.rows(1), tokens(1)
    bare = run.logits(rows, input_ids=ids)
    mask = (torch.arange(LENGTH + PAD) >= PAD).long()[None]
    inputs = {
        "input_ids": torch.nn.functional.pad(ids, (PAD, 0)),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    wide = None if rows is None else torch.nn.functional.pad(rows, (0, 0, 0, 0, PAD, 0), value=-1)
    torch.testing.assert_close(run.logits(wide, **inputs)[:, PAD:], bare, atol=2e-5, rtol=0)


def generated(model: Any, replayed: bool) -> None:
    """Routes recorded while `generate` runs with a cache, replayed in one pass, are those of that pass by itself."""
    run = Runner(model, replayed)
    ids = tokens()
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if run.replay is None:
        model.generate(ids, **options)
        return
    with run.replay.record_generation() as recording:
        out = model.generate(ids, **options)
    rows = recording.rows(out)
    native = model(input_ids=out[:, :-1], use_cache=False).logits
    torch.testing.assert_close(run.logits(rows, input_ids=out[:, :-1]), native, atol=2e-5, rtol=0)


FEATURES: dict[str, Check] = {
    "gradient checkpointing": lambda model, replayed: checkpointing(model, replayed, False),
    "reentrant checkpointing": lambda model, replayed: checkpointing(model, replayed, True),
    "torch.compile": compiled,
    "packed sequences": packed,
    "left padding": left_padded,
    "recorded `generate`": generated,
}
_STATE = "linear attention carries its state from one packed sequence to the next"
_MASK = "the installed transformers makes this model's mask without positions, so that packed sequences see each other"
LIMITS = {
    ("packed sequences", "qwen3_next"): _STATE,
    ("packed sequences", "qwen3_5_moe_text"): _STATE,
    ("packed sequences", "gpt_oss"): _MASK,
}
"""(feature, family) -> why the model itself cannot."""


def table() -> str:
    """Families by features; float32 and bfloat16 exactness is of test_families."""
    columns = ["float32", "bfloat16", *FEATURES]
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    notes: list[str] = []
    for family in NAMED:
        cells = ["exact", "exact"]
        for feature in FEATURES:
            reason = LIMITS.get((feature, family))
            if reason is not None and reason not in notes:
                notes.append(reason)
            cells.append("yes" if reason is None else f"no ({notes.index(reason) + 1})")
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"({place}) {reason}" for place, reason in enumerate(notes, start=1))]).rstrip()


if __name__ == "__main__":
    print(table())
