"""Code that is worth what its tests say: the answer's last fenced code block, run in a sandbox.

A label is `{"cases": [{"stdin": TEXT, "stdout": TEXT}, ...]}`, of which each is a run of the program, or
`{"asserts": TEXT or [TEXT, ...]}`, Python statements that run after it. The former never show the program what is
expected; asserts run in the program's own process, where code that is out to cheat can find them.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from pacenote.trainer.environments.sandbox import Limits, Sandbox
from pacenote.trainer.tasks import Message, answer_text

SANDBOX = Sandbox(limits=Limits())
_FENCED = re.compile(r"^ {0,3}(`{3,})[^`\n]*\n(.*?)^ {0,3}\1`*[ \t]*$", re.DOTALL | re.MULTILINE)
_HARNESS = """
import json, sys
given = json.load(sys.stdin)
names = {"__name__": "solution"}
exec(compile(given["source"], "solution.py", "exec"), names)
exec(compile(given["asserts"], "asserts.py", "exec"), names)
print("\\n" + given["word"])
"""


def passed(messages: list[Message], label: Any) -> float | None:
    """Reward: 1 if the last code block passes every test, else 0; None if the label is not one.

    Raises:
        SandboxError: the sandbox could not be built.
    """
    try:
        check_label(label)
    except ValueError:
        return None
    source = last_block(answer_text(messages))
    return 0.0 if source is None else float(passes(source, label))


def passes(source: str, label: dict[str, Any], sandbox: Sandbox = SANDBOX) -> bool:
    """Whether a Python program passes the tests of a label, of which the first that fails is the last to run."""
    if "cases" in label:
        for case in label["cases"]:
            outcome = sandbox.python(source, stdin=case["stdin"])
            if outcome.code != 0 or outcome.truncated or _lines(outcome.stdout) != _lines(case["stdout"]):
                return False
        return True
    asserts = label["asserts"] if isinstance(label["asserts"], str) else "\n".join(label["asserts"])
    word = secrets.token_hex(16)  # a program that ends early with exit code 0 does not say it
    given = json.dumps({"source": source, "asserts": asserts, "word": word})
    outcome = sandbox.python(_HARNESS, stdin=given)
    return outcome.code == 0 and word in outcome.stdout.splitlines()


def last_block(text: str) -> str | None:
    """Content of the last fenced code block that is closed; None if there is none."""
    blocks = _FENCED.findall(text)
    return blocks[-1][1] if blocks else None


def check_label(label: Any) -> None:
    """Refuse what is no label.

    Raises:
        ValueError: neither cases nor asserts, both, none of them, or of another shape.
    """
    if not isinstance(label, dict) or ("cases" in label) == ("asserts" in label):
        raise ValueError(f"code expects an object with cases or asserts, got {str(label)[:80]}")
    if "cases" in label:
        cases = label["cases"]
        if not isinstance(cases, list) or not cases:
            raise ValueError("code expects cases to be a non-empty list")
        for place, case in enumerate(cases):
            if not isinstance(case, dict) or not all(isinstance(case.get(name), str) for name in ("stdin", "stdout")):
                raise ValueError(f"code expects cases[{place}] to be an object of texts stdin and stdout")
        return
    lines = [label["asserts"]] if isinstance(label["asserts"], str) else label["asserts"]
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) and line.strip() for line in lines):
        raise ValueError("code expects asserts to be Python text, or a non-empty list of such")
    try:
        compile("\n".join(lines), "asserts", "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"code expects asserts to be Python: {error}") from error


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
