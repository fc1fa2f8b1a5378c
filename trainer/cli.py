"""The `pacenote` command."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

USAGE = """\
usage: pacenote <command> ...

  train RECIPE [flags]    run a recipe; `pacenote train tiny --help` lists every flag with its default
  train --resume RUN_DIR  go on with an interrupted run
  plan RECIPE [flags]     memory of a rank and bytes of a step, before anything is started
  report RUN_DIR          write RUN_DIR/report.html again
  engine [flags]          start SGLang engines (or embedded ones), here or on Ray, and register them
  serve [flags]           the session server: OpenAI chat in, exact tokens, logprobs and routes kept
  sessions COMMAND STORE  list, show, export, check, back up and compact a session server's journal
  workers COMMAND [flags] add, list, remove and watch the workers of a router
  verify-template [flags] does a model's chat template only append? tried on a CPU over all orders of roles
  doctor MODEL [flags]    which layers of a model route, and whether replay is exact; a folder or its config.json
  --version               print the version

recipes: tiny, glm47_flash, qwen3_30b_a3b, moonlight, deepseek_v3
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status. Errors that a person can act on are one sentence, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from pacenote import __version__

        print(__version__)
        return 0
    commands = {
        "train": _train,
        "plan": _plan,
        "report": _report,
        "serve": _serve,
        "sessions": _sessions,
        "workers": _workers,
        "verify-template": _verify,
        "doctor": _doctor,
        "engine": _engine,
    }
    if command not in commands:
        return _fail(f"unknown command {command!r}; the commands are: {', '.join(commands)}", 2)
    return commands[command](rest)


def _train(words: list[str]) -> int:
    import tyro
    from transformers.utils import logging

    from pacenote.trainer import algorithms, loop, recipes
    from pacenote.trainer.config import RunConfig
    from pacenote.trainer.errors import TrainerError
    from pacenote.trainer.report import summary

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if words and words[0] == "--resume":
            if len(words) != 2:
                raise ValueError("--resume expects one run folder and no other flag: the run's config.json is used")
            run = loop.resume(Path(words[1]), os.environ)
        else:
            if not words or words[0].startswith("-"):
                raise ValueError(f"train expects a recipe first; the recipes are: {', '.join(sorted(recipes.RECIPES))}")
            default = recipes.find(words[0])
            if (name := _algorithm(words)) is not None:  # before the flags, which override what it sets
                default = algorithms.apply(default, name)
            config = tyro.cli(
                RunConfig, default=default, args=words[1:], prog=f"pacenote train {words[0]}",
                description=recipes.RECIPES[words[0]].__doc__,
            )  # fmt: skip
            run = loop.train(config, os.environ)
    except ValueError as error:
        return _fail(str(error), 2)
    except TrainerError as error:
        return _fail(" ".join([f"{error}.", *getattr(error, "__notes__", [])]), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped at once; the newest whole checkpoint stands", 130)
    if os.environ.get("RANK", "0") != "0":
        return 0  # the first rank speaks for all
    for finding in summary(run.root):
        print(f"{'!' if finding.kind == 'warning' else '-'} {finding.text}")
    print(f"done: open {_short(run.report)}")
    return 0


def _algorithm(words: list[str]) -> str | None:
    """The value of --algorithm, in either way of writing it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--algorithm", nargs="?")
    name: str | None = parser.parse_known_args(words)[0].algorithm
    return name


def _report(words: list[str]) -> int:
    from pacenote.trainer.report import write_report

    if len(words) != 1 or words[0].startswith("-"):
        return _fail("report expects one run folder: pacenote report RUN_DIR", 2)
    try:
        path = write_report(Path(words[0]))
    except ValueError as error:
        return _fail(str(error), 2)
    print(f"open {_short(path)}")
    return 0


def _plan(words: list[str]) -> int:
    from transformers.utils import logging

    from pacenote.trainer.plan_cli import plan_command

    logging.set_verbosity_error()
    return plan_command(words)


def _serve(words: list[str]) -> int:
    from pacenote.rollout.serve_cli import serve_command

    return serve_command(words)


def _engine(words: list[str]) -> int:
    from pacenote.rollout.engine_cli import engine_command

    return engine_command(words)


def _verify(words: list[str]) -> int:
    from pacenote.rollout.verify import verify_command

    return verify_command(words)


def _sessions(words: list[str]) -> int:
    from pacenote.rollout.sessions_cli import sessions_command

    return sessions_command(words)


def _workers(words: list[str]) -> int:
    from pacenote.rollout.workers_cli import workers_command

    return workers_command(words)


def _doctor(words: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="pacenote doctor",
        description="Say which layers of a model route, by which rule, and whether recorded routes replay exactly, "
        "tried on a small random model of the same architecture.",
        epilog="exit status: 0 exact, 1 not, 2 cannot tell",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder, or its config.json")
    parser.add_argument("--weights", action="store_true", help="load the model's own weights and try it with them, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        asked = parser.parse_args(words)
    except SystemExit as end:
        return int(end.code or 0)
    from pacenote.replay.doctor import diagnose

    try:
        found = diagnose(asked.model, weights=asked.weights)
    except ValueError as error:
        return _fail(str(error), 2)
    print(found.json() if asked.json else found.text())
    return found.status


def _fail(text: str, status: int) -> int:
    print(f"pacenote: {text}", file=sys.stderr)
    return status


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
