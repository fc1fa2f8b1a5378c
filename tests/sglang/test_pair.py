"""A real prefill/decode pair of SGLang over TCP: what each side knows of the routes, and what both together give."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from pacenote.replay.record import DECODE
from pacenote.replay.wire import decode_sglang
from pacenote.rollout.launch import Service, free_port, sessions_command
from pacenote.rollout.server import load_geometry
from tests.rollout.talk import MORE, TOOL, USER, left_open, records, said, samples
from tests.rollout.talk import start as open_session
from tests.sglang.conftest import START_SECONDS, Start
from tests.sglang.test_sessions import check, running, wait
from tests.sglang.truth import Truth

PROMPT = [10, 11, 12, 13, 14, 100, 30, 31]
ANSWER = 24
CLOSE = 2e-3
BODY = {
    "input_ids": PROMPT,
    "sampling_params": {"max_new_tokens": ANSWER, "temperature": 0, "ignore_eos": True},
    "return_logprob": True,
    "return_routed_experts": True,
}


class Pair:
    """Both servers and the port at which prefill tells decode about itself."""

    def __init__(self, prefill: Service, decode: Service, port: int) -> None:
        self.prefill, self.decode, self.port = prefill, decode, port

    def ask(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same body to both sides at once; their answers."""
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.port, "bootstrap_room": random.getrandbits(62)}

        def one(service: Service) -> dict[str, Any]:
            answer = httpx.post(service.url + path, json=body | room, timeout=60, trust_env=False)
            assert answer.status_code == 200, answer.text
            said: dict[str, Any] = answer.json()
            return said

        with ThreadPoolExecutor(2) as pool:
            prefill, decode = pool.map(one, (self.prefill, self.decode))
        return prefill, decode


@pytest.fixture(scope="module")
def pair(glm: Path, start: Start) -> Iterator[Pair]:
    port = free_port()
    common = {"dtype": "float32", "weight_version": "0", "max_running_requests": 8, "context_length": 512}
    made = Pair(start(glm, role="prefill", bootstrap_port=port, **common), start(glm, role="decode", **common), port)
    for service in (made.prefill, made.decode):
        service.wait_healthy(START_SECONDS)
    yield made
    for service in (made.prefill, made.decode):
        assert service.alive, service.tail()


@pytest.fixture(scope="module")
def truth(glm: Path) -> Truth:
    return Truth(glm)


def test_neither_side_has_all_rows_and_both_together_do(pair: Pair, truth: Truth, glm: Path) -> None:
    prefill, decode = pair.ask("/generate", BODY)
    tokens = PROMPT + decode["output_ids"]
    logprobs, experts = truth(tokens)
    said = [entry[0] for entry in decode["meta_info"]["output_token_logprobs"]]
    np.testing.assert_allclose(said, logprobs[len(PROMPT) - 1 :], atol=CLOSE)
    first, rest = rows(prefill, glm, len(PROMPT)), rows(decode, glm, len(tokens) - 1)
    assert not rest[: len(PROMPT)].any(), "decode knows nothing of the prompt's routes"
    assert prefill["output_ids"] == decode["output_ids"][:1]
    np.testing.assert_array_equal(np.concatenate([first, rest[len(PROMPT) :]]), experts)


@pytest.mark.parametrize("place", [1, len(PROMPT) - 1, len(PROMPT)])
def test_both_sides_cut_at_the_same_row(pair: Pair, truth: Truth, glm: Path, place: int) -> None:
    prefill, decode = pair.ask("/generate", BODY | {"routed_experts_start_len": place})
    _, experts = truth(PROMPT + decode["output_ids"])
    first, rest = rows(prefill, glm, len(PROMPT) - place), rows(decode, glm, len(experts) - place)
    np.testing.assert_array_equal(np.concatenate([first, rest[len(first) :]]), experts[place:])


def test_a_chat_goes_the_same_way(pair: Pair, truth: Truth, glm: Path) -> None:
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "input_ids": PROMPT, "max_tokens": ANSWER,
        "temperature": 0, "ignore_eos": True, "logprobs": True, "return_meta_info": True, "return_routed_experts": True,
    }  # fmt: skip
    prefill, decode = (answer["choices"][0] for answer in pair.ask("/v1/chat/completions", body))
    ids = [entry[1] for entry in decode["meta_info"]["output_token_logprobs"]]
    _, experts = truth(PROMPT + ids)
    first, rest = rows(prefill, glm, len(PROMPT)), rows(decode, glm, len(experts))
    np.testing.assert_array_equal(np.concatenate([first, rest[len(first) :]]), experts)
    assert (prefill["finish_reason"], prefill["meta_info"]["completion_tokens"]) == ("length", 1)


@pytest.fixture(scope="module")
def sessions(pair: Pair, glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A session server that drives the pair."""
    port = free_port()
    sides = f"{pair.prefill.url},{pair.port},{pair.decode.url}"
    extra = ["--pair", sides, "--tito-allowed-append-roles", "user", "tool", "--timeout", "60"]
    command = sessions_command(glm, upstream=pair.prefill.url, port=port, extra=extra)
    log = tmp_path_factory.mktemp("sessions") / "sessions.log"
    with Service("sessions", command, url=f"http://127.0.0.1:{port}", log=log) as service:
        service.wait_healthy(60)
        yield service
    assert "Traceback" not in log.read_text()


def test_sessions_over_the_pair(sessions: Service, truth: Truth, client: Callable[[Service], httpx.Client]) -> None:
    """Three turns, each asking for the rows that its session lacks: joined, they are one forward pass's."""
    http = client(sessions)
    session = open_session(http)
    history = [USER]
    for number, more in enumerate((TOOL, MORE, None)):
        history.append(said(http, session, history, max_tokens=12, seed=number, temperature=1.0))
        history += [more] if more else []
    [trajectory] = samples(http, session)
    check(trajectory, truth)
    assert trajectory.provenance.all(), "a row is missing"


def test_leaving_frees_both_sides(pair: Pair, sessions: Service, client: Callable[[Service], httpx.Client]) -> None:
    http, prefill, decode = client(sessions), client(pair.prefill), client(pair.decode)
    session = open_session(http)
    with left_open(http, session, {"messages": [USER], "max_tokens": 400, "ignore_eos": True}):
        wait(lambda: running(decode) == 1)
    wait(lambda: running(decode) == running(prefill) == 0)
    assert records(http, session) == []
    said(http, session, [USER], max_tokens=2)


def rows(answer: dict[str, Any], model: Path, count: int) -> NDArray[Any]:
    """The routes of an answer of either endpoint: [count, L, K], sorted."""
    record = decode_sglang(
        answer["meta_info"]["routed_experts"], load_geometry(str(model)), rows=count,
        provenance=np.full(count, DECODE, dtype=np.uint8), version=np.zeros(count, dtype=np.int32),
    )  # fmt: skip
    return np.sort(record.experts)
