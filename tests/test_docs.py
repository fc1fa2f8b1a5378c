"""What README and docs say exists: files, make targets, commands and flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pacenote.trainer import recipes
from pacenote.trainer.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(page: Path) -> str:
    """The text of code blocks and inline code."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_exist(page: Path) -> None:
    named = re.findall(
        r"\b(?:kernels|replay|rollout|trainer|tests|benchmarks|scripts|docs)/[\w./]+\.(?:py|md)\b", code(page)
    )
    assert not [file for file in named if not (ROOT / file).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", code(page))) <= targets


def help_text(*words: str) -> str:
    """What a command's --help prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return out.getvalue()


def test_flags_exist() -> None:
    known = {"train": help_text("train", "tiny") + " --resume", "serve": help_text("serve"), "report": ""}
    for page in PAGES:
        for command, words in re.findall(r"pacenote (train|serve|report)\b([^\n`]*)", code(page)):
            for flag in re.findall(r"--[a-z][\w.-]*", words.split("#")[0]):
                assert flag in known[command], f"{name(page)}: pacenote {command} has no {flag}"


def test_every_flag_of_a_run_is_explained() -> None:
    """docs/training.md names each field of a RunConfig as the command line does; `--tiny.*` stands for a shape."""
    said = set(re.findall(r"`--([a-z.*-]+)`", (ROOT / "docs" / "training.md").read_text(encoding="utf-8")))

    def flags(config: Any, prefix: str = "") -> Iterator[str]:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from flags(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}".replace("_", "-")

    found = {flag for flag in flags(recipes.tiny()) if not flag.startswith("tiny.") and flag != "recipe"}
    assert found - said == set()
    assert {flag for flag in said if "." in flag} - found == {"tiny.*"}
