"""Parse answers and requests with SGLang's own classes, in a process of its own. No server, no torch.

    python tests/rollout/protocol_classes.py FOLDER < bodies.json

FOLDER is where scripts/install.py puts SGLang without its dependencies. Prints how many bodies each class parsed, and a
line for each that it refuses or that has a field which the class drops.
"""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from typing import Any


def load_classes(folder: str) -> Any:
    """SGLang's module of OpenAI bodies, without its package's `__init__`, which loads torch and all that it serves."""
    sys.path.append(folder)
    package = types.ModuleType("sglang")
    package.__path__ = [f"{folder}/sglang"]
    sys.modules["sglang"] = package
    from sglang.srt.entrypoints.openai import protocol

    return protocol


def known(value: Any) -> Any:
    """The value without fields that are null, which SGLang's classes leave out where they may."""
    if isinstance(value, dict):
        return {key: known(inner) for key, inner in value.items() if inner is not None}
    return [known(inner) for inner in value] if isinstance(value, list) else value


def main(folder: str) -> None:
    """Read bodies from standard input, parse them, report."""
    protocol = load_classes(folder)
    kinds = {
        "chat.completion": protocol.ChatCompletionResponse,
        "error": protocol.ErrorResponse,
        "list": protocol.ModelList,
    }
    bodies = json.load(sys.stdin)
    pairs = [(kinds[body["object"]], body) for body in bodies["answers"] if body.get("object") in kinds]
    pairs += [(protocol.ChatCompletionRequest, body) for body in bodies["requests"]]
    counts: Counter[str] = Counter()
    wrong = []
    for kind, body in pairs:
        try:
            parsed = kind.model_validate(body).model_dump(mode="json", exclude_unset=True)
        except ValueError as error:
            wrong.append(f"{kind.__name__} refuses {body!r:.200}: {error}".replace("\n", " "))
            continue
        counts[kind.__name__] += 1
        lost = [name for name in known(body) if name not in known(parsed)]
        if lost or (kind is not protocol.ChatCompletionRequest and known(parsed) != known(body)):
            wrong.append(f"{kind.__name__} reads {known(body)!r:.300} as {known(parsed)!r:.300}; dropped: {lost}")
    print("\n".join([json.dumps(counts), *wrong]))


if __name__ == "__main__":
    main(sys.argv[1])
