"""The server as processes: killed and started again, out of disk, several behind one port."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pacenote.rollout.gate import read_head
from pacenote.rollout.launch import Service, free_port, sessions_command
from pacenote.rollout.serve_cli import serve_command
from pacenote.rollout.server import SessionConfig, create_app
from pacenote.rollout.share import place

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

WAIT = 60
USER = {"role": "user", "content": "a"}
MORE = {"role": "user", "content": "b"}
TOKEN = "an-admin-token-of-mine"


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """A client for any server."""
    with httpx.Client(timeout=WAIT, trust_env=False) as client:
        yield client


class Server(Service):
    """A session server's process; killed rather than stopped by `kill`."""

    def kill(self) -> None:
        """SIGKILL, as the kernel does it when memory runs out."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()


@contextmanager
def process(
    model: Path, engine: ScriptedEngine, folder: Path, *extra: str, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """A session server of roles tool and user, in front of the scripted engine."""
    port = free_port()
    options = ["--no-probe", "--tito-allowed-append-roles", "tool", "user", *extra]
    command = sessions_command(model, upstream=engine.url, port=port, extra=options)
    server = Server("sessions", command, url=f"http://127.0.0.1:{port}", log=folder / "sessions.log", env=env)
    with server:
        server.wait_healthy(WAIT)
        yield server


def said(http: httpx.Client, session: str, messages: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    answer = http.post(f"{session}/v1/chat/completions", json={"messages": messages, **fields})
    assert answer.status_code == 200, answer.text
    message: dict[str, Any] = answer.json()["choices"][0]["message"]
    return message


def begun(http: httpx.Client, server: Server) -> str:
    return f"{server.url}/sessions/{http.post(f'{server.url}/sessions').json()['session_id']}"


def outside(http: httpx.Client, session: str) -> tuple[Any, bytes, bytes]:
    """All that can be collected of a session."""
    every = http.post(f"{session}/samples", json={"include_superseded": True})
    return http.get(session).json(), http.post(f"{session}/samples").content, every.content


def test_killed_between_turns_and_started_again(
    tiny_dir: Path, engine: ScriptedEngine, tmp_path: Path, http: httpx.Client
) -> None:
    journal = tmp_path / "journal"
    with process(tiny_dir, engine, tmp_path, "--store", f"sqlite:{journal}") as server:
        session, gone, empty = (begun(http, server) for _ in range(3))
        first = said(http, session, [USER])
        said(http, session, [USER])  # supersedes the first
        second = said(http, session, [USER, first, MORE])
        said(http, gone, [USER])
        assert http.delete(gone).status_code == 204
        said(http, f"{server.url}/sessions/of-my-own", [USER])
        names = [session, f"{server.url}/sessions/of-my-own", empty]
        before = [outside(http, name) for name in names]
        assert [record["status"] for record in before[0][0]["records"]] == ["superseded", "completed", "completed"]
        answered = killed_under_load(server)
        server.start()
        server.wait_healthy(WAIT)
        kept = {
            f"{n}": {record["id"] for record in http.get(f"{server.url}/sessions/{n}").json()["records"]}
            for n in "0123"
        }
        assert all(id in kept[n] for n, id in answered)  # whatever a client has seen is there
        assert [outside(http, name) for name in names] == before
        assert http.get(gone).json()["error"]["code"] == "session_deleted"
        held = len(engine.bodies[2]["input_ids"]) + 2
        said(http, session, [USER, first, MORE, second, {"role": "tool", "content": "c"}])
        assert engine.bodies[-1]["input_ids"][:held] == [*engine.bodies[2]["input_ids"], 40, 41]
        assert engine.bodies[-1]["routed_experts_start_len"] == held - 1
        assert [record["parent"] for record in http.get(session).json()["records"]] == [None, None, 1, 2]
        assert_held(tiny_dir, engine, journal)
        assert_disk(http, server, session)
    log = (tmp_path / "sessions.log").read_text()
    assert "Traceback" not in log


def killed_under_load(server: Server) -> list[tuple[str, str]]:
    """Kill the server while four agents chat; returns (session, completion) of what they got."""
    answered: list[tuple[str, str]] = []

    def chat(name: str) -> None:
        with httpx.Client(timeout=WAIT, trust_env=False) as http, contextlib.suppress(httpx.HTTPError):
            while True:
                answer = http.post(f"{server.url}/sessions/{name}/v1/chat/completions", json={"messages": [USER]})
                answered.append((name, answer.json()["id"]))

    with ThreadPoolExecutor(4) as pool:
        agents = [pool.submit(chat, name) for name in "0123"]
        while len(answered) < 40:
            assert not any(agent.done() for agent in agents)
            time.sleep(0.01)
        server.kill()
    for agent in agents:
        agent.result()
    return answered


def assert_held(model: Path, engine: ScriptedEngine, journal: Path) -> None:
    """No other server takes the journal."""
    options = ["--model", str(model), "--upstream", engine.url, "--port", "0", "--store", f"sqlite:{journal}"]
    assert serve_command(options) == 2


def assert_disk(http: httpx.Client, server: Server, session: str) -> None:
    """What cannot be written is not answered as done, changes nothing, and can be sent again."""
    assert server.pid is not None
    before = outside(http, session)
    unlimited = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    answer = http.post(f"{session}/v1/chat/completions", json={"messages": [MORE]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert http.post(f"{server.url}/sessions").status_code == 503
    assert http.delete(session).status_code == 503
    assert outside(http, session) == before
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, unlimited)
    said(http, session, [MORE])
    assert len(http.get(session).json()["records"]) == len(before[0]["records"]) + 1


def children(pid: int | None) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_several_processes_behind_one_port(
    tiny_dir: Path, engine: ScriptedEngine, tmp_path: Path, http: httpx.Client
) -> None:
    extra = ["--workers", "2", "--store", f"sqlite:{tmp_path / 'journal'}", "--auth", "tokens"]
    with process(tiny_dir, engine, tmp_path, *extra, env={"PACENOTE_AUTH_TOKENS": TOKEN}) as server:
        health = [http.get(f"{server.url}/health").json() for _ in range(4)]
        assert health == [health[0]] * 4  # one server, whoever answers
        assert http.post(f"{server.url}/sessions").status_code == 401
        http.headers["authorization"] = f"Bearer {TOKEN}"
        sessions = [begun(http, server) for _ in range(6)]
        places = [place(session.rpartition("/")[2], 2) for session in sessions]
        assert set(places) == {0, 1}  # each in turn
        histories = [[USER, said(http, session, [USER]), MORE] for session in sessions]
        answers = [said(http, session, history) for session, history in zip(sessions, histories, strict=True)]
        assert len(answers) == 6
        assert_streams(http, server, engine, sessions)
        before = [outside(http, session) for session in sessions]
        assert [len(seen[0]["records"]) for seen in before] == [3, 3, 2, 2, 2, 2]
        # An encoded id is the same id.
        last = sessions[-1].rpartition("/")[2]
        encoded = f"{server.url}/sessions/%{ord(last[0]):02x}{last[1:]}"
        assert http.get(encoded).json()["records"] == before[-1][0]["records"]
        # One of them dies: the others go on, and it comes back with what it held.
        workers = [pid for pid in children(server.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        deadline = time.monotonic() + WAIT
        while (answer := http.get(f"{server.url}/health")).status_code != 503:  # asked of each in turn
            assert time.monotonic() < deadline
        assert answer.json()["error"]["code"] == "worker_unavailable"
        assert len({at for session, at in zip(sessions, places, strict=True) if dead(http, session)}) <= 1
        while not all(http.get(session).status_code == 200 for session in sessions):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [outside(http, session) for session in sessions] == before
        for session, history, answer_ in zip(sessions[2:], histories[2:], answers[2:], strict=True):
            said(http, session, [*history, answer_, MORE])
            assert http.get(session).json()["records"][-1]["parent"] == 1
        pids = children(server.pid)
    assert server.exit_code is None  # stopped and reaped
    gone(pids)
    log = (tmp_path / "sessions.log").read_text()
    assert "ended with exit code -9" in log
    assert "Traceback" not in log


def dead(http: httpx.Client, session: str) -> bool:
    return http.get(session).status_code == 503


def assert_streams(http: httpx.Client, server: Server, engine: ScriptedEngine, sessions: Sequence[str]) -> None:
    """Through the gate: an answer as events, a large body, and a client that leaves."""
    body = {"messages": [{"role": "user", "content": "long " * 40_000}], "stream": True}
    for session in sessions[:2]:
        with http.stream("POST", f"{session}/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
    engine.reset()
    engine.hold()
    url, content = httpx.URL(sessions[0]), json.dumps({"messages": [MORE]}).encode()
    head = (
        f"POST {url.path}/v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port or 80)) as client:
        client.sendall(head.encode() + content)
        assert engine.arrived.acquire(timeout=WAIT)
    assert engine.aborted.acquire(timeout=WAIT)
    engine.release()
    large = f"POST {url.path}/samples HTTP/1.1\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 99999999999\r\n\r\n"
    assert spoken(server, large.encode()).startswith(b"HTTP/1.1 413 ")
    for wrong in (b"nonsense\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/3\r\n\r\n"):
        assert spoken(server, wrong).startswith(b"HTTP/1.1 400 ")
    assert spoken(server, b"GET /" + b"x" * 70_000).startswith(b"HTTP/1.1 431 ")


def spoken(server: Server, data: bytes) -> bytes:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=WAIT) as client:
        client.sendall(data)
        return client.recv(65536)


def test_a_model_that_no_process_can_load(tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--upstream", "http://x", "--port", "0", "--workers", "2", "--store", f"sqlite:{tmp_path}/no/folder"]
    assert serve_command(["--model", str(tiny_dir), *options]) == 2
    said_ = capfd.readouterr().err.strip()
    assert said_.startswith("error: cannot make ")
    assert "\n" not in said_


def test_the_head_is_read_as_the_processes_read_it() -> None:
    path, head = read_head(
        b"GET http://h/sessions/a%62c/v1?x=/sessions/z HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, x\r\nX: 1\r\n\r\n"
    )
    assert path == "/sessions/abc/v1"
    assert (
        head == b"GET http://h/sessions/a%62c/v1?x=/sessions/z HTTP/1.1\r\nHost: h\r\nX: 1\r\nconnection: close\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--host", "0.0.0.0"], "auth off is for loopback hosts, got host 0.0.0.0"),
        (["--auth", "tokens"], "expected at least one token with --auth tokens: give --auth-file or set PACENOTE_AUTH"),
        (["--auth", "tokens", "--auth-file", "/no/such"], "expected --auth-file /no/such as a file of tokens"),
        (["--auth-file", "/no/such"], "expected --auth tokens with --auth-file"),
        (["--store", "here"], "expected a store of memory or sqlite:PATH, got 'here'"),
        (["--session-ttl", "-1"], "expected a session ttl above 0 seconds, got -1.0"),
        (["--max-body", "0"], "expected a max body of at least 1, got 0"),
        (["--workers", "0"], "expected a number of workers of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(
    tiny_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    text: str,
) -> None:
    monkeypatch.delenv("PACENOTE_AUTH_TOKENS", raising=False)
    usual = ["--model", str(tiny_dir), "--upstream", "http://127.0.0.1:1", "--port", "0"]
    assert serve_command([*usual, *options]) == 2
    said_ = capsys.readouterr().err
    assert said_.startswith("error: ")
    assert said_.count("\n") == 1
    assert text in said_


def test_an_address_that_cannot_be_had(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACENOTE_AUTH_TOKENS", TOKEN)
    usual = ["--model", str(tiny_dir), "--upstream", "http://127.0.0.1:1", "--port", "0", "--auth", "tokens"]
    assert serve_command([*usual, "--host", "256.0.0.1"]) == 2
    assert "cannot listen on 256.0.0.1:0" in capsys.readouterr().err


FLEET = """
import os, signal, sys, socket
from pathlib import Path
from pacenote.rollout import processes, serving
from pacenote.rollout.errors import StartupError
from starlette.responses import PlainTextResponse

def work(share, listener, ready):
    flag = Path(sys.argv[2])
    if flag.exists():
        raise StartupError("no more of these")
    async def app(scope, receive, send):
        if scope["type"] == "http":
            if scope["path"] == "/die":
                os.kill(os.getpid(), signal.SIGKILL)
            await PlainTextResponse(f"{share.index} {os.getpid()}")(scope, receive, send)
    listener.listen()
    ready()
    serving.run(app, listener)

if __name__ == "__main__":
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(sys.argv[1])))
        processes.run(work, listener, count=2, ready=lambda: print("up", flush=True))
        print("over", flush=True)
"""


def test_processes_that_die_and_one_that_cannot_start_again(tmp_path: Path, http: httpx.Client) -> None:
    """SIGTERM ends all, also while a process is waiting to be started; SIGKILL of the parent ends its children."""
    (tmp_path / "fleet.py").write_text(FLEET)
    port, flag = free_port(), tmp_path / "flag"
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(tmp_path / "fleet.py"), str(port), str(flag)]
    server = Server("fleet", command, url=url, log=tmp_path / "log")
    with server:
        server.wait_healthy(WAIT)
        first = {http.get(url).text for _ in range(4)}
        assert {text[0] for text in first} == {"0", "1"}
        assert http.get(f"{url}/die").json()["error"]["code"] == "worker_unavailable"
        deadline = time.monotonic() + WAIT
        while len(second := {http.get(url).text for _ in range(4)}) < 2:  # while one is down the other answers
            assert time.monotonic() < deadline
        assert len(first & second) == 1
        pids = children(server.pid)
        server.kill()
        gone(pids)
        server.start()
        server.wait_healthy(WAIT)
        flag.touch()
        assert http.get(f"{url}/die").status_code == 503
        while "cannot start: no more of these" not in server.tail():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert http.get(url).status_code == 200  # the other
        pids = children(server.pid)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGTERM)
        gone(pids)
        while server.alive:
            assert time.monotonic() < deadline
        assert server.exit_code == 0
    assert server.tail(1) == "over"


def gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + WAIT
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_journal_of_another_model(
    tiny_dir: Path, tmp_path: Path, served_app: type[Served], capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"sqlite:{tmp_path}/journal"
    app = create_app(SessionConfig(model=str(tiny_dir), upstream="http://x", store=store))
    with served_app(app):
        pass
    other = ["--model", str(tiny_dir), "--upstream", "http://x", "--port", "0", "--store", store, "--no-routing-replay"]
    assert serve_command(other) == 2
    said_ = capsys.readouterr().err
    assert "was written with another tokenizer, routing or --match" in said_
    assert "5 layers" in said_
    assert "no routes" in said_
    assert said_.count("\n") == 1
