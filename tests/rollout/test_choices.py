"""n > 1: every choice is sampled, recorded and answered, or none is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.responses import JSONResponse, Response

from tests.rollout.talk import MORE, USER, WAIT, chat, error, events, left_open, records, said, samples, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine

Make = Callable[..., dict[str, Any]]


class Numbered:
    """Answers 1, 2, 3 ..., one after the other."""

    def __init__(self, answer: Make, *, spoil: int = 0, how: Callable[[], Any] | None = None) -> None:
        self._answer, self._spoil, self._how = answer, spoil, how
        self._lock, self._count = threading.Lock(), 0

    def __call__(self, body: dict[str, Any]) -> Any:
        """The next answer; that of number `spoil` is another."""
        with self._lock:
            self._count += 1
            if self._count == self._spoil and self._how is not None:
                return self._how()
            return self._answer(body, [40 + self._count, 498], matched=498, text=f"answer {self._count}")


def test_every_choice_is_recorded_as_a_sibling(http: httpx.Client, engine: ScriptedEngine, answer: Make) -> None:
    session = start(http)
    first = said(http, session, [USER])
    engine.write = Numbered(answer)
    body = chat(http, session, [USER, first, MORE], n=3, temperature=0.7).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    ids = [choice["token_ids"] for choice in body["choices"]]
    assert sorted(ids) == [[41, 498], [42, 498], [43, 498]]
    prompt = body["prompt_token_ids"]
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 6, "total_tokens": len(prompt) + 6}
    assert len(engine.bodies) == 4
    assert all("n" not in sent and sent["input_ids"] == prompt for sent in engine.bodies[1:])
    kept = records(http, session)[1:]
    assert [(record["parent"], record["choice"], record["status"]) for record in kept] == [
        (0, 0, "completed"),
        (0, 1, "completed"),
        (0, 2, "completed"),
    ]
    assert {record["id"] for record in kept} == {body["id"]}
    assert [record["response"]["content"] for record in kept] == [c["message"]["content"] for c in body["choices"]]
    trajectories = samples(http, session)
    assert [t.tokens[-2:].tolist() for t in trajectories] == ids
    assert sorted(t.trained for t in trajectories) == [2, 2, 4]  # the answer that they share is trained once
    engine.write = None
    said(http, session, [USER, first, MORE, body["choices"][1]["message"], MORE])
    assert records(http, session)[-1]["parent"] == 2
    assert len(samples(http, session)) == 3


def test_choices_asked_again_supersede_them_all(http: httpx.Client, engine: ScriptedEngine, answer: Make) -> None:
    session = start(http)
    engine.write = Numbered(answer)
    for _ in range(2):
        assert chat(http, session, [USER], n=2).status_code == 200
    assert [record["status"] for record in records(http, session)] == ["superseded"] * 2 + ["completed"] * 2
    assert [t.status for t in samples(http, session, include_superseded=True)] == ["superseded"] * 2 + ["completed"] * 2


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        (lambda: Response(b"boom", 500), 502, "upstream_error"),
        (lambda: Response(b"{}", 200), 502, "upstream_error"),
        (
            lambda: JSONResponse({"message": "longer than the model's context length"}, 400),
            400,
            "context_length_exceeded",
        ),
    ],
)
@pytest.mark.parametrize("spoil", [1, 3])
def test_one_that_fails_leaves_none(
    http: httpx.Client, engine: ScriptedEngine, answer: Make, how: Callable[[], Any], status: int, code: str, spoil: int
) -> None:
    session = start(http)
    engine.write = Numbered(answer, spoil=spoil, how=how)
    error(chat(http, session, [USER], n=3), status, code)
    assert records(http, session) == []


def test_the_others_are_aborted(http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor) -> None:
    """One is refused while the others still generate: they are aborted in the engine, and the client need not wait."""
    session = start(http)
    engine.hold(passes=1)
    engine.write = lambda _: Response(b"boom", 500)
    waiting = pool.submit(chat, http, session, [USER], n=3)
    error(waiting.result(WAIT), 502, "upstream_error")
    for _ in engine.bodies[1:]:  # one that had not been sent yet never is
        assert engine.aborted.acquire(timeout=WAIT)
    engine.release()
    assert records(http, session) == []


def test_a_client_that_leaves_aborts_all(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    engine.hold()
    with left_open(http, session, {"messages": [USER], "n": 3}):
        for _ in range(3):
            assert engine.arrived.acquire(timeout=WAIT)
    for _ in range(3):
        assert engine.aborted.acquire(timeout=WAIT)
    engine.release()
    assert records(http, session) == []


def test_seeds_differ_so_that_answers_can(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    for seed in (7, 2**63 - 1, None):
        assert chat(http, session, [USER], n=3, seed=seed).status_code == 200
    seeds: list[Any] = [body.get("seed") for body in engine.bodies]
    assert sorted(seeds[:3]) == [7, 8, 9]
    assert sorted(seeds[3:6]) == [0, 1, 2**63 - 1]
    assert seeds[6:] == [None] * 3


def test_a_stream_of_choices(http: httpx.Client, engine: ScriptedEngine, answer: Make) -> None:
    engine.write = Numbered(answer)
    session = start(http)
    *chunks, usage = events(chat(http, session, [USER], n=3, stream=True, stream_options={"include_usage": True}))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 2]
    assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == [
        record["response"]["content"] for record in records(http, session)
    ]
    assert usage["usage"]["completion_tokens"] == 6
