"""Broken kernels, each with the check that must catch it. Run under TRITON_INTERPRET=1, from the repository's root:

    python -m tests.kernels.mutants          # one JSON line a mutant: its name, the check, and what the check said

A mutant is the source of the kernels with a text replaced. The first line is the kernel as it is, under all the checks
that are named.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import pacenote.kernels
from pacenote.kernels import route_order, route_triton
from tests.kernels import interpreter
from tests.kernels.route_checks import CHECKS


@dataclass(frozen=True, slots=True)
class Mutant:
    """One replacement in the kernel's source, or two, and the check that fails with it."""

    name: str
    text: str
    instead: str
    check: str
    also: tuple[str, str] | None = None


MUTANTS = (
    Mutant("tail rows are stored", "    here = t < T\n", "    here = t < T + BT\n", "sizes"),
    Mutant("last row is lost", "    here = t < T\n", "    here = t < T - 1\n", "recorded_order"),
    Mutant(
        "tail experts are loaded", "live[:, None] & (e < E)[None, :]", "live[:, None] & (e >= 0)[None, :]", "groups"
    ),
    Mutant("tail lanes hold 0", 'mask=mask, other=float("-inf"))', "mask=mask, other=0.0)", "qwen3-plain-float32"),
    Mutant(
        "ties go to the highest index",
        "(SPAN - 1 - index), LOWEST",
        "index, LOWEST",
        "ties",
        ("SPAN - 1 - (best & (SPAN - 1)).to(tl.int32)", "(best & (SPAN - 1)).to(tl.int32)"),
    ),
    Mutant("-0 is below 0", "tl.where(x == 0.0, 0, key)", "tl.where(x == 0.0, key, key)", "order_of_logits"),
    Mutant(
        "NaN is an ordinary number",
        "tl.where(x != x, 0x7FFFFFFF, key)",
        "tl.where(x != x, -1, key)",
        "infinities_and_nan",
    ),
    Mutant("negative scores sort backwards", "tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)", "bits", "order_of_logits"),
    Mutant("groups stay open", "tl.where(tl.reshape(opened, [BT, BE]), order, closed)", "order", "groups"),
    Mutant("one group too many is open", "for _ in range(OPEN):", "for _ in range(OPEN + 1):", "groups"),
    Mutant("a group's score is its best alone", "for _ in range(DEPTH):", "for _ in range(1):", "groups"),
    Mutant("scores select where logits do", "if not BY_LOGITS:", "if True:", "order_of_logits"),
    Mutant("the bias is left out", "x += tl.load(bias", "x += 0 * tl.load(bias", "bias_selects_only"),
    Mutant("rows lie close together", "rows + t[:, None] * stride", "rows + t[:, None] * K", "layer_views"),
    Mutant("logits lie close together", "logits + t[:, None] * stride", "logits + t[:, None] * E", "layer_views"),
    Mutant("row offsets are int32", "    t = t.to(tl.int64)\n", "", "far_rows"),
    Mutant(
        "ids keep 32 bits",
        "mask=here[:, None] & column, other=0).to(tl.int64)",
        "mask=here[:, None] & column, other=0).to(tl.int32)",
        "id_types",
    ),
    Mutant("E itself is an expert", "(wide >= E)", "(wide > E)", "invalid_rows"),
    Mutant(
        "a repeat beside is all that is seen",
        "(k[:, None] < k[None, :])",
        "(k[:, None] + 1 == k[None, :])",
        "invalid_rows",
    ),
    Mutant(
        "missing is out of range",
        "tl.where(missing > 0, _FREED, fate)",
        "tl.where(missing > 0, _OUT_OF_RANGE, fate)",
        "invalid_rows",
    ),
    Mutant("free rows are replayed", "tl.where(asked == _FREE, _FREED, fate)", "fate", "kimi-k2-float32"),
    Mutant(
        "padding has one place",
        "((t % E)[:, None] * K + k[None, :]) % E",
        "k[None, :] + 0 * t[:, None]",
        "padding",
    ),
    Mutant(
        "padding has weight",
        "w = tl.where(live[:, None], rounded(w * SCALE, logits, LOW), 0.0)",
        "w = rounded(w * SCALE, logits, LOW)",
        "padding",
    ),
    Mutant("padding has a gradient", "dense = tl.where(live[:, None], dense, 0.0)", "dense = dense", "padding"),
    Mutant("eps is left out", "rounded(share + EPS, logits, LOW)", "share", "renormalisation"),
    Mutant("no rounding to the scores' dtype", "if LOW else x", "if False else x", "narrow_scores"),
    Mutant(
        "empty columns are renormalised",
        "rounded(tl.sum(tl.where(column, w, 0.0), axis=1), logits, LOW)",
        "rounded(tl.sum(w, axis=1), logits, LOW)",
        "minimax-float32",
    ),
    Mutant("rank is off by one", "(better < K)", "(better <= K)", "recorded_order"),
    Mutant(
        "padding counts",
        "(here[:, None] & (c < _FATES) & (fate[:, None] == c))",
        "((c < _FATES) & (fate[:, None] == c))",
        "counts_add_up",
    ),
    Mutant(
        "softmax's gradient has no mean", "dense = -dense * dot[:, None]", "dense = dense * 0.0", "qwen3-plain-float32"
    ),
    Mutant(
        "renormalisation has no gradient",
        "slope = tl.div_rn(slope - mean[:, None], share[:, None])",
        "slope = tl.div_rn(slope, share[:, None])",
        "mixtral-float32",
    ),
    Mutant("gradients have no scale", ".to(tl.float32) * SCALE", ".to(tl.float32)", "glm-4.7-flash-float32"),
)


def verdict(check: str) -> str:
    """What a check says: an empty string, or its error."""
    try:
        CHECKS[check](torch.device("cpu"))
    except Exception as error:  # a mutant may fail in any way
        return f"{type(error).__name__}: {error}"[:200] or "failed"
    return ""


def mutate(mutant: Mutant, folder: Path) -> None:
    """Put a mutant where the op imports its kernel from."""
    number = MUTANTS.index(mutant)
    order, kernel = (Path(module.__file__ or "").read_text(encoding="utf-8") for module in (route_order, route_triton))
    for text, instead in filter(None, ((mutant.text, mutant.instead), mutant.also)):
        assert text in order + kernel, f"the kernel has no {text!r}"
        order, kernel = order.replace(text, instead), kernel.replace(text, instead)
    (folder / f"mutant_order_{number}.py").write_text(order, encoding="utf-8")
    kernel = kernel.replace("pacenote.kernels.route_order", f"mutant_order_{number}")
    (folder / f"mutant_{number}.py").write_text(kernel, encoding="utf-8")
    importlib.invalidate_caches()
    # The op looks its kernel up as an attribute of the package at every call.
    vars(pacenote.kernels)["route_triton"] = importlib.import_module(f"mutant_{number}")


def main() -> None:
    """Try the kernel as it is, then each mutant."""
    interpreter.install()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors hold NaN
    said = "; ".join(filter(None, (verdict(check) for check in sorted({mutant.check for mutant in MUTANTS}))))
    print(json.dumps({"name": "", "check": "all", "said": said}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sys.path.append(folder)
        for mutant in MUTANTS:
            mutate(mutant, Path(folder))
            print(json.dumps({"name": mutant.name, "check": mutant.check, "said": verdict(mutant.check)}), flush=True)


if __name__ == "__main__":
    main()
