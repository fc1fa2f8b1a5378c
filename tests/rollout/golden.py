"""SGLang's recorded answers, and what another engine's answers to the same calls differ in.

`golden/*.json` were recorded from SGLang 0.5.23 by `make test-sglang ARGS=--record`. A comparison says where two
answers differ in structure, field names, types or values. What may differ, and why, stands in this file and nowhere
else: VOLATILE (numbers of the moment), WORDS (sentences that no program reads) and DIFFERENCES (where the embedded
engine is another one).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.rollout.golden_calls import Answers

FOLDER = Path(__file__).parent / "golden"
CLOSE = 1e-3  # between float32 logprobs of two implementations

VOLATILE = re.compile(
    r"\.(id|created|timestamp|e2e_latency|response_sent_to_client_ts|port|model_path|tokenizer_path|random_seed|url|"
    r"worker_id|worker_url|location)$"
)
WORDS = re.compile(r"\.(message|error)$")
READ = re.compile(r"prompt too long|answer too long")
"""Calls whose sentence is read: by sessions, which tell a client that its conversation is too long."""
TIMED = re.compile(r"aborted|through ")
"""Calls that something ends or interrupts: how many tokens they had by then differs from run to run."""

DIFFERENCES: dict[str, dict[str, str]] = {
    "chat": {
        r"^no limit: ": "SGLang keeps six tokens of the context for itself; the embedded engine fills it",
        r"^no tokens: ": "the embedded engine cannot prefill without generating, and says so",
    },
    "generate": {},
    "info": {
        r"^/v1/loads: ": "the embedded engine reports requests and tokens, not what a GPU holds",
        r"server_info: instance_id: not SGLang's": "tells one start from the next on the same port",
        r"server_info: disaggregation_bootstrap_port": "8998 by default; the embedded engine has one as prefill only",
        r"server_info: internal_states": "the embedded engine has no scheduler with a state of its own",
        r"server_info: max_": "sizes of another memory",
        r"model_info: (embedding|load_format): missing": "features that the embedded engine lacks",
    },
    "workers": {
        r"engine_load": "what /v1/loads says, passed on",
        r"labels\.(load_balance_method|enable_dp_attention|attn_dp_size|is_embedding|max_total_tokens): missing":
            "options that the embedded engine has not",
    },
    "control": {
        r"^version after .*: (embedding|load_format): missing": "features that the embedded engine lacks",
        r"^version after .*: served_model_name: ": "SGLang calls itself by the path of its weights after an update",
        r"^update in .*: num_paused_requests: ": "SGLang says none where its scheduler holds one",
        r"^abort without a name: ": "SGLang says yes and does nothing; the embedded engine asks for a name",
    },
}  # fmt: skip
"""Differences `call: path: what` that are meant: kind of calls -> pattern -> why."""


def load(kind: str) -> Answers:
    """The recorded answers of one kind of calls."""
    answers: Answers = json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    return answers


def differences(recorded: Answers, answered: Answers) -> Iterator[str]:
    """One line for each place where answers to the same calls differ: `call: path: what`."""
    assert recorded.keys() == answered.keys(), recorded.keys() ^ answered.keys()
    for name, wanted in recorded.items():
        timed, read = bool(TIMED.search(name)), bool(READ.search(name))
        for place, what in _compare(wanted, answered[name], "", timed, read):
            yield f"{name}: {place.removeprefix('.body').lstrip('.')}: {what}"


def _compare(wanted: Any, got: Any, place: str, timed: bool, read: bool) -> Iterator[tuple[str, str]]:
    if isinstance(wanted, dict) and isinstance(got, dict):
        for name in wanted.keys() | got.keys():
            if name not in got or name not in wanted:
                yield f"{place}.{name}", "missing" if name in wanted else "not SGLang's"
            else:
                yield from _compare(wanted[name], got[name], f"{place}.{name}", timed, read)
    elif isinstance(wanted, list) and isinstance(got, list):
        if len(wanted) != len(got) and not timed:
            yield place, f"{len(wanted)} elements, here {len(got)}"
        for index, pair in enumerate(zip(wanted, got, strict=False)):
            yield from _compare(*pair, f"{place}[{index}]", timed, read)
    elif type(wanted) is not type(got):
        yield place, f"{wanted!r:.100}, here {got!r:.100}"
    elif place.endswith(".routed_experts"):
        yield from ((place, what) for what in _compare_rows(wanted, got, timed))
    elif not _equal(wanted, got, place, timed, read):
        yield place, f"{wanted!r:.100}, here {got!r:.100}"


def _equal(wanted: Any, got: Any, place: str, timed: bool, read: bool) -> bool:
    if VOLATILE.search(place) or (WORDS.search(place) and not read):
        return True
    if isinstance(wanted, float):
        return bool(abs(wanted - got) < CLOSE)
    # How far the answer came decides these: its text, its counts, where its spans of versions end.
    if timed and (isinstance(wanted, int) or re.search(r"content|text$", place)) and "_logprobs[" not in place:
        return True
    return bool(wanted == got)


def _compare_rows(wanted: str, got: str, timed: bool) -> Iterator[str]:
    """Payloads of routed experts: as many int32, and the same experts (the same first ones, if `timed`)."""
    one, other = (np.frombuffer(base64.b64decode(text), dtype="<i4") for text in (wanted, got))
    if len(one) != len(other) and not timed:
        yield f"{len(one)} int32, here {len(other)}"
    both = min(len(one), len(other)) // 2 * 2
    if (np.sort(one[:both].reshape(-1, 2)) != np.sort(other[:both].reshape(-1, 2))).any():
        yield "other experts"
