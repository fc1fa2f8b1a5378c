"""The embedded engine, the session server and the SDK, each a process of its own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from pacenote.rollout.launch import Service, engine_command, free_port, sessions_command
from pacenote.rollout.messages import ROLES
from pacenote.rollout.server import load_geometry
from tests.rollout.talk import USER, WAIT, records, said, samples, start


@pytest.fixture(scope="module")
def road(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a session server process in front of an engine process with a short context."""
    logs = tmp_path_factory.mktemp("road")
    engine_port, port = free_port(), free_port()
    behind, url = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{port}"
    command = engine_command(tiny_dir, port=engine_port, context_length=160, served_model_name="tiny", dtype="float32")
    front = sessions_command(
        tiny_dir, upstream=behind, port=port, extra=["--served-model", "tiny", "--tito-allowed-append-roles", *ROLES]
    )
    with (
        Service("engine", command, url=behind, log=logs / "engine.log") as engine,
        Service("sessions", front, url=url, log=logs / "sessions.log") as sessions,
    ):
        sessions.wait_healthy(120)
        engine.wait_healthy(120)
        yield url
        assert sessions.alive, sessions.tail()
    assert "Traceback" not in (logs / "sessions.log").read_text()


def test_the_whole_road(road: str, tiny_dir: Path) -> None:
    with httpx.Client(base_url=road, timeout=WAIT, trust_env=False) as http:
        session = start(http)
        client = openai.OpenAI(base_url=f"{road}{session}/v1", api_key="x", max_retries=0)
        history: list[Any] = [{"role": "user", "content": "hello"}]
        sent = []
        for number, role in enumerate(("tool", "user", "assistant")):
            got = client.chat.completions.create(
                model="m", messages=history, max_tokens=4, seed=number, temperature=1.0, extra_body={"top_p": 0.9}
            )
            extra: Any = got.choices[0].model_dump()
            sent.append(extra["prompt_token_ids"] + extra["token_ids"])
            history += [got.choices[0].message.model_dump(), {"role": role, "content": f"{role} {number}"}]
        [trajectory] = samples(http, session)
        assert trajectory.tokens.tolist() == sent[-1]
        assert trajectory.experts is not None
        assert trajectory.experts.shape == (len(trajectory) - 1, 5, 2)
        assert load_geometry(str(tiny_dir)).layers == trajectory.layers == (1, 2, 3, 4, 5)
        assert (trajectory.logprobs[trajectory.loss_mask == 1] < 0).all()
        assert not trajectory.logprobs[trajectory.loss_mask == 0].any()
        assert [r["parent"] for r in records(http, session)] == [None, 0, 1]
        # The same tokens in one go route as they did turn by turn.
        fresh = start(http)
        whole = [{"role": "user", "content": "hello"}]
        said(http, fresh, whole, max_tokens=1, seed=5)
        [first] = samples(http, fresh)
        prompt = len(first) - 1
        assert first.experts is not None
        np.testing.assert_array_equal(np.sort(first.experts[:prompt]), np.sort(trajectory.experts[:prompt]))
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x " * 200}])
        assert caught.value.code == "context_length_exceeded"
        client.close()


def test_leaving_frees_the_engine(road: str) -> None:
    """The answer that nobody waited for is aborted in the engine and not recorded."""
    with httpx.Client(base_url=road, timeout=WAIT, trust_env=False) as http:
        session = start(http)
        body = json.dumps({"messages": [USER], "max_tokens": 140, "ignore_eos": True}).encode()
        head = f"POST {session}/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as client:
            client.sendall(head.encode() + body)
        said(http, session, [USER], max_tokens=1)
        assert [record["completion_tokens"] for record in records(http, session)] == [1]
