"""The table of layouts in docs/replay.md, from what test_layouts runs over. Prints it:

python -m tests.replay.megatron.layouts_table    # from the repository's root, src on PYTHONPATH
"""

from __future__ import annotations

from tests.replay.megatron.ranks import LAYOUTS, Layout


def sizes(layout: Layout) -> str:
    """Parallel sizes in words, for example TP2 + SP."""
    words = [f"{axis.upper()}{size}" for axis, size in layout.sizes.items() if axis != "etp"]
    return " + ".join([*words, "SP"] if layout.config.get("sequence_parallel") else words)


def table() -> str:
    """A line a layout; every one of them holds the bounds that the page states above it."""
    lines = [
        "| two processes | batches | attention | dense layers | recomputed | routers |",
        "|---|---|---|---|---|---|",
    ]
    for layout in LAYOUTS.values():
        frequency = layout.config.get("moe_layer_freq")
        dense = "the first" if frequency is None else f"{frequency.count(0)} of {len(frequency)}, a stage has no other"
        recomputed = layout.config.get("recompute_granularity", "nothing")
        recomputed = "the MoE layers" if recomputed == "selective" else recomputed.replace("full", "every layer")
        attention = "MLA" if layout.mla else "plain"
        routers = "fused" if layout.fused else "Megatron's"
        lines.append(f"| {sizes(layout)} | {layout.format} | {attention} | {dense} | {recomputed} | {routers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
