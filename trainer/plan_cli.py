"""`pacenote plan RECIPE`: the memory of a rank and the bytes of a step, before anything is started."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from pacenote.trainer.plan import Plan, plan

MEMORY = {
    "weights": "weights",
    "gradients": "gradients, float32",
    "optimizer": "Adam's moments, and float32 masters of bfloat16 weights",
    "gathered": "a layer in one piece, and the head (FSDP2)",
    "activations": "activations of a microbatch (estimated)",
    "logits": "logits of a chunk, which is what is alive of them",
    "routes": "routes of a microbatch",
}


def plan_command(words: Sequence[str]) -> int:
    """Print a plan; the flags of `pacenote train` change it as they change a run."""
    import tyro

    from pacenote.trainer import recipes
    from pacenote.trainer.config import RunConfig

    parser = argparse.ArgumentParser(
        prog="pacenote plan", description="Memory of a rank and bytes of a step, from the model's config alone.",
        epilog="every flag of `pacenote train RECIPE` may follow, such as --megatron.expert 8",
    )  # fmt: skip
    parser.add_argument("recipe", help=f"one of: {', '.join(sorted(recipes.RECIPES))}")
    parser.add_argument("--world", type=int, help="ranks of the trainer (default: the recipe's)")
    parser.add_argument("--tokens", type=int, help="positions of a microbatch (default: --optim.microbatch-tokens)")
    parser.add_argument(
        "--length", type=int, default=8192, help="tokens of a sample, on average (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        asked, rest = parser.parse_known_args(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    try:
        default = recipes.find(asked.recipe)
        config = tyro.cli(RunConfig, default=default, args=rest, prog=f"pacenote plan {asked.recipe}")
        world = asked.world or recipes.WORLDS[asked.recipe]
        found = plan(recipes.shape(config), config, world=world, tokens=asked.tokens, length=asked.length)
    except ValueError as error:
        print(f"pacenote: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(found), indent=2) if asked.json else text(found))
    return 0


def text(found: Plan) -> str:
    """Tables in Markdown."""
    total = sum(found.parameters.values())
    lines = [
        f"{total / 1e6:,.1f} million parameters, {found.active / 1e6:,.1f} active",
        "",
        *table(("parameters", "millions"), [(kind, f"{n / 1e6:,.3f}") for kind, n in found.parameters.items()]),
        "",
        f"The fullest of {found.world} ranks, microbatches of {found.tokens} positions:",
        "",
        *table(("memory of a rank", "MiB"), memory_rows(found)),
        "",
        *table(("a step", "MB"), [(name, f"{count / 1e6:,.1f}") for name, count in found.step.items()]),
        "",
        f"{found.cache} bytes a token in an engine's cache.",
    ]
    return "\n".join(lines)


def memory_rows(found: Plan) -> list[tuple[str, str]]:
    """What is for what, in MiB, and the sum."""
    rows = [(words, getattr(found.memory, name)) for name, words in MEMORY.items()]
    return [(words, f"{size / 2**20:,.1f}") for words, size in [*rows, ("together", found.memory.total)] if size]


def table(head: tuple[str, str], rows: Sequence[tuple[Any, Any]]) -> list[str]:
    """Two columns."""
    return [f"| {head[0]} | {head[1]} |", "|---|--:|", *(f"| {left} | {right} |" for left, right in rows)]
