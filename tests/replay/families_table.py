"""The table of router families in docs/replay.md, from what the tests run over. Prints it:

python -m tests.replay.families_table     # from the repository's root, with src on PYTHONPATH
"""

from __future__ import annotations

from collections import defaultdict

from transformers import CONFIG_MAPPING

from pacenote.replay.doctor import how
from pacenote.replay.families import REFUSED
from pacenote.replay.spec import families, router_spec


def table() -> str:
    """Families by the spec that their default config has; each stands in test_families, in float32 and bfloat16."""
    rows: dict[str, list[str]] = defaultdict(list)
    for family in families():
        known = family in CONFIG_MAPPING
        config = CONFIG_MAPPING[family]().to_dict() if known else {"model_type": family}
        rows[how(router_spec(config))].append(f"`{family}`")
    lines = ["| weights of the default config | families, replayed exactly |", "|---|---|"]
    lines += [f"| {spec} | {', '.join(names)} |" for spec, names in sorted(rows.items())]
    lines += [
        "",
        "Refused, with the reason in the error: " + ", ".join(f"`{family}`" for family in sorted(REFUSED)) + ".",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
