"""The session server: its endpoints and its command line."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from starlette.responses import Response

from pacenote.rollout.errors import StartupError
from pacenote.rollout.serve_cli import serve_command
from pacenote.rollout.server import SessionConfig, create_app, load_geometry
from tests.rollout.talk import MORE, USER, WAIT, chat, error, records, said, samples, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine

TOLD = {"role": "assistant", "content": "x"}


def test_a_session_from_start_to_end(http: httpx.Client) -> None:
    session = start(http)
    assert http.get(session).json() == {
        "session_id": session.rpartition("/")[2],
        "records": [],
        "metadata": {
            "accumulated_token_ids": [],
            "created": http.get(session).json()["metadata"]["created"],
            "recovered": False,
            "recovered_from": None,
            "in_flight": 0,
        },
    }
    assert samples(http, session) == []
    answer = chat(http, session, [USER], model="mine").json()
    choice = answer["choices"][0]
    prompt = answer["prompt_token_ids"]
    assert (answer["object"], answer["model"]) == ("chat.completion", "mine")
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 2,
        "total_tokens": len(prompt) + 2,
    }
    assert choice["message"] == {"role": "assistant", "content": "ok", "reasoning_content": None}
    assert (choice["token_ids"], choice["prompt_token_ids"], choice["finish_reason"]) == ([40, 41], prompt, "length")
    body = http.get(session).json()
    assert body["metadata"]["accumulated_token_ids"] == [*prompt, 40, 41]
    assert [record["id"] for record in body["records"]] == [answer["id"]]
    [trajectory] = samples(http, session)
    assert trajectory.tokens.tolist() == [*prompt, 40, 41]
    gone = http.delete(session)
    assert (gone.status_code, gone.content) == (204, b"")
    for use in (http.get(session), chat(http, session, [USER]), http.post(f"{session}/samples")):
        assert "was deleted: start another with POST /sessions" in error(use, 410, "session_deleted")
    assert http.delete(session).status_code == 204


def test_an_unknown_id(http: httpx.Client) -> None:
    session = "/sessions/never-started"
    assert http.get(session).json() == {
        "session_id": "never-started",
        "records": [],
        "metadata": {"accumulated_token_ids": []},
    }
    error(http.post(f"{session}/samples"), 404, "session_not_found")  # looking has created nothing
    said(http, session, [USER, TOLD, MORE])  # a chat starts it
    answer = http.get(session).json()
    assert (answer["metadata"]["recovered"], answer["metadata"]["recovered_from"]) == (True, 3)
    [record] = answer["records"]
    assert record["note"].endswith("what was generated in it starts at messages[3]")
    assert len(samples(http, session)) == 1
    said(http, session, [MORE])  # another root of a session that is known by now
    assert records(http, session)[1]["note"] is None
    assert http.get(session).json()["metadata"]["recovered_from"] == 3
    assert "at most 256 characters" in error(chat(http, "/sessions/" + "x" * 257, [USER]), 400, "bad_request")


def test_a_chat_that_fails_starts_nothing(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.write = lambda _: Response(b"boom", 500)
    for number, messages in enumerate(([USER], None)):
        session = f"/sessions/not-started-{number}"
        assert chat(http, session, messages).status_code in (400, 502)
        assert http.get(session).json()["metadata"] == {"accumulated_token_ids": []}
        error(http.post(f"{session}/samples"), 404, "session_not_found")


def test_an_unknown_id_that_is_deleted_while_it_generates(
    http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    engine.hold()
    waiting = pool.submit(chat, http, "/sessions/early", [USER])
    assert engine.arrived.acquire(timeout=WAIT)
    assert http.delete("/sessions/early").status_code == 204
    assert engine.aborted.acquire(timeout=WAIT)
    error(waiting.result(WAIT), 410, "session_deleted")


def test_health_and_models(http: httpx.Client) -> None:
    health = http.get("/health").json()
    assert health["status"] == "ok"
    assert health == http.get("/health").json()  # the instance id stays
    models = http.get(f"{start(http)}/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_paths_that_are_not_served(http: httpx.Client) -> None:
    error(http.get("/nothing"), 404, "not_found")
    error(http.get("/sessions"), 405, "method_not_allowed")
    error(http.get(f"{start(http)}/v1/chat/completions"), 405, "method_not_allowed")


def one_sentence(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_port_in_use(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve_command(["--model", str(tiny_dir), "--upstream", "http://x", "--port", str(port)]) == 2
    said_ = one_sentence(capsys.readouterr().err)
    assert said_ == f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "/no/such"], "expected a model directory, got /no/such: no such directory"),
        (["--upstream", "localhost:3"], "expected upstream as an http:// or https:// URL, got 'localhost:3'"),
        (["--timeout", "0"], "expected a timeout above 0 seconds, got 0"),
        (["--timeout", "nan"], "expected a timeout above 0 seconds, got nan"),
        (["--port", "70000"], "expected a port in 0..65535, got 70000"),
        (["--match", "loose"], "expected match as strict, loose-tool-call, role-content or package.module:function"),
        (["--match", "no_such_module:f"], "cannot import no_such_module:f: ModuleNotFoundError"),
        (["--host", "0.0.0.0"], "auth off is for loopback hosts, got host 0.0.0.0"),
    ],
)
def test_options_that_cannot_be(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    usual = ["--model", str(tiny_dir), "--upstream", "http://127.0.0.1:1", "--port", "0"]
    assert serve_command([*usual, *options]) == 2
    assert text in one_sentence(capsys.readouterr().err)


def test_flags_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_command(["--upstream", "http://x"]) == 2
    assert "--model" in capsys.readouterr().err
    assert serve_command(["--model", "m", "--upstream", "http://x", "--policy", "list"]) == 2
    assert "--policy: invalid choice: 'list'" in capsys.readouterr().err
    assert serve_command(["--help"]) == 0
    assert "--tito-allowed-append-roles" in capsys.readouterr().out


def test_models_whose_routing_is_not_known(tiny_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny_dir / name).read_bytes())
    for text in (None, "{", '{"model_type": "gpt2"}'):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(StartupError, match="--no-routing-replay") as caught:
            load_geometry(str(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="append roles of system, user, assistant, tool, got judge"):
        SessionConfig(model="m", upstream="http://x", append_roles=frozenset({"judge"}))
    with pytest.raises(ValueError, match="a policy of tree, linear, got 'list'"):
        SessionConfig(model="m", upstream="http://x", policy="list")
    create_app(SessionConfig(model=str(tmp_path), upstream="http://x", routing_replay=False))


def test_the_process_says_where_it_is_and_ends_on_a_signal(tiny_dir: Path) -> None:
    command = [sys.executable, "-m", "pacenote.rollout.server", "--model", str(tiny_dir), "--upstream", "http://x:1"]
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            assert words[:2] == ["sessions", "on"]
            with httpx.Client(base_url=words[2].rstrip(","), timeout=WAIT, trust_env=False) as http:
                assert http.get("/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=WAIT)
            assert (process.returncode, out, err) == (0, "", "")
        finally:
            process.kill()
