"""Sessions in front of real SGLang: tokens, logprobs and routes are those of one forward pass of transformers.

In float32, where hardly an expert is chosen by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from pacenote.replay.record import CACHED, DECODE, PREFILL
from pacenote.rollout.launch import Service, free_port, sessions_command
from pacenote.rollout.trajectory import Trajectory
from tests.rollout.talk import MORE, TOOL, USER, chat, left_open, records, said, samples, start
from tests.sglang.conftest import START_SECONDS, Start
from tests.sglang.truth import Truth, same_logprobs, same_routes


@pytest.fixture(scope="module", params=["glm", "qwen"])
def served(
    request: pytest.FixtureRequest, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Service, Service]]:
    """The model, its SGLang, and a session server in front of it."""
    model: Path = request.getfixturevalue(request.param)
    engine = start(model, dtype="float32", weight_version="0", max_running_requests=16, context_length=512)
    port = free_port()
    extra = ["--family", "glm47", "--tito-allowed-append-roles", "user", "tool", "--timeout", "60"]
    front = sessions_command(model, upstream=engine.url, port=port, extra=extra)
    log = tmp_path_factory.mktemp("sessions") / "sessions.log"
    with Service("sessions", front, url=f"http://127.0.0.1:{port}", log=log) as sessions:
        engine.wait_healthy(START_SECONDS)
        sessions.wait_healthy(60)
        yield model, engine, sessions
        assert engine.alive, engine.tail()
        assert "Traceback" not in log.read_text()
    engine.stop()


def check(trajectory: Trajectory, truth: Truth) -> None:
    """Everything that a trajectory says is what transformers computes for its tokens."""
    logprobs, experts = truth(trajectory.tokens.tolist())
    assert trajectory.layers == truth.layers
    assert trajectory.experts is not None
    same_routes(trajectory.experts, experts)
    trained = trajectory.loss_mask.astype(bool)
    assert trained.any()
    same_logprobs(trajectory.logprobs[trained], logprobs[trained[1:]])
    assert (trajectory.version[trained] == 0).all()


def test_turns_add_up_to_one_forward_pass(
    served: tuple[Path, Service, Service], client: Callable[[Service], httpx.Client]
) -> None:
    """Three turns, each asking only for the rows that its session lacks; the prefix comes from SGLang's cache."""
    model, engine, sessions = served
    truth, http = Truth(model), client(sessions)
    assert client(engine).post("/flush_cache").status_code == 200
    session = start(http)
    history = [USER]
    for number, more in enumerate((TOOL, MORE, None)):
        history.append(said(http, session, history, max_tokens=12, seed=number, temperature=1.0))
        history += [more] if more else []
    [trajectory] = samples(http, session)
    check(trajectory, truth)
    found = set(trajectory.provenance.tolist())
    assert {PREFILL, DECODE} <= found
    assert [record["parent"] for record in records(http, session)] == [None, 0, 1]
    # The same first message in a new session: its rows come from the cache, and are the same.
    again = start(http)
    said(http, again, [USER], max_tokens=3)
    [short] = samples(http, again)
    check(short, truth)
    assert CACHED in short.provenance


def test_sampled_many_at_once(served: tuple[Path, Service, Service], client: Callable[[Service], httpx.Client]) -> None:
    """Rows of a full batch reach their own requests."""
    from concurrent.futures import ThreadPoolExecutor

    model, _, sessions = served
    truth, http = Truth(model), client(sessions)
    open_ = [start(http) for _ in range(12)]
    with ThreadPoolExecutor(12) as pool:
        list(
            pool.map(
                lambda pair: said(http, pair[1], [{"role": "user", "content": "x" * pair[0]}], max_tokens=6 + pair[0]),
                enumerate(open_),
            )
        )
    for session in open_:
        [trajectory] = samples(http, session)
        check(trajectory, truth)


def test_what_sglang_refuses_is_said(
    served: tuple[Path, Service, Service], client: Callable[[Service], httpx.Client]
) -> None:
    http = client(served[2])
    session = start(http)
    too_long = chat(http, session, [{"role": "user", "content": "x " * 900}])
    assert too_long.status_code == 400
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert chat(http, session, [USER], temperature=-1).status_code == 400
    assert records(http, session) == []


def test_leaving_and_aborting(served: tuple[Path, Service, Service], client: Callable[[Service], httpx.Client]) -> None:
    """A client that leaves frees SGLang; an answer that SGLang aborted is an error and leaves no record."""
    from concurrent.futures import ThreadPoolExecutor

    _, engine, sessions = served
    http, behind = client(sessions), client(engine)
    session = start(http)
    with left_open(http, session, {"messages": [USER], "max_tokens": 400, "ignore_eos": True}):
        wait(lambda: running(behind) == 1)
    wait(lambda: running(behind) == 0)
    assert records(http, session) == []
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(chat, http, session, [USER], max_tokens=400, ignore_eos=True)
        wait(lambda: running(behind) == 1)
        assert behind.post("/abort_request", json={"abort_all": True}).status_code == 200
        answer = waits.result(60)
    assert answer.status_code == 502, answer.text
    assert "abort" in answer.json()["error"]["message"]
    assert records(http, session) == []


def running(engine: httpx.Client) -> int:
    """Requests that an engine works on."""
    (load,) = engine.get("/v1/loads").json()["loads"]
    return int(load["num_running_reqs"])


def wait(what: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until it is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
