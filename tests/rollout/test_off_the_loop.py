"""The event loop only waits: parsing, matching, rendering and large answers have threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pacenote.rollout import chat as chat_module
from pacenote.rollout import completion as completion_module
from pacenote.rollout import front as front_module
from pacenote.rollout.session import Session
from pacenote.rollout.template import Template
from tests.rollout.talk import USER, WAIT, chat, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

MATCHED: list[str] = []


def key(message: dict[str, Any]) -> object:
    """A key function that notes where it runs."""
    MATCHED.append(threading.current_thread().name)
    return message


def threads_of(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> list[str]:
    """Names of the threads that call a function from now on."""
    names: list[str] = []
    function = getattr(holder, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        names.append(threading.current_thread().name)
        return function(*args, **kwargs)

    monkeypatch.setattr(holder, name, watched)
    return names


def test_what_takes_long_has_a_thread(
    serve: Callable[..., Served],
    engine: ScriptedEngine,
    answer: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.write = lambda body: answer(body, [40 + i % 400 for i in range(3000)])
    with (
        serve(match=f"{__name__}:key") as served,
        httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http,
    ):
        session = start(http)
        MATCHED.clear()
        places = [
            (chat_module, "parse_messages"), (Template, "render"), (Template, "encode"), (chat_module, "chat_body"),
            (chat_module, "read_reply"), (completion_module, "_choice"), (front_module, "_parsed"),
            (completion_module.Completion, "events"), (Session, "records"), (Session, "branches"),
            (front_module, "encode_samples"),
        ]  # fmt: skip
        seen = {name: threads_of(monkeypatch, holder, name) for holder, name in places} | {"key": MATCHED}
        assert chat(http, session, [USER], stream=True, user="x" * chat_module.LARGE).status_code == 200
        assert http.get(session).status_code == 200
        assert http.post(f"{session}/samples").status_code == 200
    assert all(names and all(name.startswith("sessions") for name in names) for names in seen.values()), seen
