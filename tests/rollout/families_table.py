"""The table of template families in docs/templates.md, from the code. Prints it:

python -m tests.rollout.families_table     # from the repository's root, with src on PYTHONPATH
"""

from __future__ import annotations

from pacenote.rollout.families import FAMILIES
from pacenote.rollout.template import Template
from tests.rollout.tokenizers import NAMES, tokenizer


def table() -> str:
    """A row a family; what closes an answer is what the tests' template of the family was measured to write."""
    lines = [
        "| family | models | fixed arguments | stop tokens | closes an answer in history | thinking of earlier turns |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        closings = Template(tokenizer(family.name), family).closings if family.name in NAMES else ()
        closed = [_code(closing) if closing else "the next role's opener" for closing in closings]
        fixed = ", ".join(f"`{name}={value!r}`" for name, value in family.fixed.items())
        cells = [
            f"`{family.name}`",
            family.models,
            fixed or "none",
            ", ".join(map(_code, family.stops)) or "found at the start",
            ", ".join(closed) or "found at the start",
            family.thinking if family.stops else "found at the start",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- `{family.name}`: {family.remark}" for family in FAMILIES.values() if family.remark)]
    return "\n".join(lines)


def _code(text: str) -> str:
    """In a table's cell."""
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


if __name__ == "__main__":
    print(table())
