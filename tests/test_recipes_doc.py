"""docs/recipes.md: its commands go through the real parsers, its tables are `pacenote plan`'s. Nothing is started."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from pacenote.rollout import serve_cli, workers_cli
from pacenote.trainer import loop, recipes
from pacenote.trainer.cli import main
from pacenote.trainer.config import RunConfig
from pacenote.trainer.errors import TrainerError
from pacenote.trainer.plan import plan

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
SBATCH = ROOT / "scripts" / "train.sbatch"
Words = list[str]


def lines(block: str) -> list[str]:
    """Commands of a block, continued lines joined."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def words(line: str) -> Words:
    """Of a command, without variables in front of it and & after it."""
    found = shlex.split(line)
    while re.match(r"[A-Z_]+=", found[0]):
        found = found[1:]
    return found[:-1] if found[-1] == "&" else found


COMMANDS = [words(line) for block in BLOCKS for line in lines(block)]


def starting(*first: str) -> list[Words]:
    return [command for command in COMMANDS if command[: len(first)] == list(first)]


def trains() -> list[Words]:
    """What follows `pacenote train`, however it is started."""
    found = [command[2:] for command in starting("pacenote", "train")]
    for command in COMMANDS:
        if command[0] == "sbatch" and SBATCH.relative_to(ROOT).as_posix() in command:
            found.append(command[command.index(SBATCH.relative_to(ROOT).as_posix()) + 1 :])
    for asked in torchruns():
        found.append(asked.training_script_args[1:])
    return found


def torchruns() -> list[Any]:
    """Arguments of each torchrun, by torch's own parser; those of a Ray job too."""
    found = [command[command.index("torchrun") + 1 :] for command in COMMANDS if "torchrun" in command]
    return [get_args_parser().parse_args(command) for command in found]


class Parsed(TrainerError):
    """Stands for the run that would begin now."""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], RunConfig]:
    """The configuration that `pacenote train` makes of words."""
    configs: list[RunConfig] = []

    def train(config: RunConfig, environment: Any) -> None:
        configs.append(config)
        raise Parsed("as far as this goes")

    monkeypatch.setattr(loop, "train", train)

    def parse(given: Sequence[str]) -> RunConfig:
        assert main(["train", *given]) == Parsed.exit_code
        return configs.pop()

    return parse


def test_all_recipes_are_there() -> None:
    assert re.findall(r"^## (\w+)$", PAGE, flags=re.MULTILINE) == list(recipes.RECIPES)
    assert {command[0] for command in trains()} == set(recipes.RECIPES)
    assert len(trains()) >= 15


@pytest.mark.parametrize("given", trains(), ids=" ".join)
def test_runs_can_be_configured(given: Words, parsed: Callable[[Sequence[str]], RunConfig]) -> None:
    config = parsed(given)
    assert config.recipe == given[0]
    if config.recipe != "tiny":
        assert config.model is not None
        assert config.out is not None
        assert config.rollout.engines or config.rollout.pairs


def test_worlds_fit_the_layouts(parsed: Callable[[Sequence[str]], RunConfig]) -> None:
    for asked in torchruns():
        assert (asked.module, asked.training_script, asked.training_script_args[0]) == (True, "pacenote", "train")
        config = replace(parsed(asked.training_script_args[1:]), model=None)  # none is there: the recipe's shape
        world = int(asked.nnodes.split(":")[0]) * int(asked.nproc_per_node)
        plan(recipes.shape(config), config, world=world)  # raises if the layout does not


def test_gateways_know_the_model_by_the_name_that_is_asked_for(parsed: Callable[[Sequence[str]], RunConfig]) -> None:
    asked = {config.rollout.served_model for config in map(parsed, trains()) if config.rollout.upstream}
    names = {command[command.index("--served-model") + 1] for command in COMMANDS if "--served-model" in command}
    assert names == asked


@pytest.mark.parametrize("given", [command[1:] for command in starting("pacenote", "plan")], ids=" ".join)
def test_plans_are_what_is_printed(given: Words, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 0
    said = capsys.readouterr().out
    assert f"```bash\n# run\npacenote {shlex.join(given)}\n```\n\n{said}" in PAGE


def test_sums_are_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"^\| `pacenote (plan [^`]+)` \| (\S+) \|$", PAGE, flags=re.MULTILINE)
    assert len(found) > 8
    for given, total in found:
        assert main(given.split()) == 0
        assert f"| together | {total} |" in capsys.readouterr().out, given


def test_engines_are_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each `pacenote engine` is one that could start, and SGLang's commands are of these."""
    known = set()
    for command in starting("pacenote", "engine"):
        assert main([*command[1:], "--python", "python3", "--print"]) == 0
        known |= set(capsys.readouterr().out.splitlines())
    shown = {shlex.join(command) for command in starting("python3", "-m", "sglang.launch_server")}
    assert len(shown) >= 5
    assert shown <= known
    assert all("--enable-return-routed-experts" in line for line in shown)


def test_servers_and_workers() -> None:
    for command in starting("pacenote", "serve"):
        serve_cli._parser().parse_args(command[2:])
    for command in starting("pacenote", "workers"):
        workers_cli._parser().parse_args(command[2:])


@pytest.mark.parametrize("block", BLOCKS)
def test_bash(block: str) -> None:
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_was_not_run_says_so(block: str) -> None:
    here = all(
        command[0] == "smg" or command[:2] == ["pacenote", "plan"] or re.search(r"\btiny\b", " ".join(command))
        or (command[:3] == ["pacenote", "workers", "add"] and "http://127.0.0.1:30001" in block)
        for command in map(words, lines(block))
    )  # fmt: skip
    assert re.match(r"# run$" if here else r"# not run(: .+)?$", block.splitlines()[0]), block


def test_sbatch(tmp_path: Path) -> None:
    """Syntax, options in front of the first command, and what srun is given."""
    text = SBATCH.read_text(encoding="utf-8")
    head, _, body = text.partition("set -euo pipefail")
    options = re.findall(r"^#SBATCH --([a-z-]+)", head, flags=re.MULTILINE)
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert {"nodes", "ntasks-per-node", "gpus-per-node"} <= set(options) <= {
        "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "output"
    }  # fmt: skip
    assert "#SBATCH" not in body
    for name, does in (("scontrol", "printf 'node3\\nnode4\\n'"), ("srun", "printf '%s\\n' \"$@\"")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NNODES": "2"}
    asked = subprocess.run(
        ["bash", str(SBATCH), "tiny", "--out", "a b"],
        env={**environment, "SLURM_JOB_ID": "7"}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert asked[:2] == ["--kill-on-bad-exit=1", "torchrun"]
    found = get_args_parser().parse_args(asked[2:])
    assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint) == ("2", "8", "node3:29400")
    assert found.training_script_args == ["train", "tiny", "--out", "a b"]
