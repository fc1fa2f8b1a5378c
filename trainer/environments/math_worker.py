"""A program of its own: compares mathematical expressions, one JSON line in, one out. `math` starts it.

In: [label, answer or null, seconds]. Out: null if the label cannot be parsed, else whether the answer is equal to it;
an answer of null only asks for the label. SIGALRM, at its default action, ends the process when the time is over:
sympy may be inside a number that no Python exception reaches.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes of address space


def main() -> None:
    """Answer until stdin ends."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        label, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict: bool | None
        try:
            gold = parse(label, parsing_timeout=None) or parse(f"${label}$", parsing_timeout=None)
            if not any(not isinstance(item, str) for item in gold):
                verdict = None
            elif answer is None:
                verdict = True
            else:
                verdict = bool(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))
        except Exception:  # of a parser and a computer algebra system fed with anything: no equality was shown
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
