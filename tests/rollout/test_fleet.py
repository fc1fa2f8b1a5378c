"""Four servers with a journal each behind nginx, by the configuration of docs/operations.md; one is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pacenote.rollout.launch import Service, free_port, sessions_command

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine

ROOT = Path(__file__).parents[2]
COUNT, WAIT = 4, 60
USER, MORE = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
TOKEN = {"authorization": "Bearer an-admin-token-of-mine"}
pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx: apt-get install nginx-light")


def configuration(ports: list[int], listen: int, folder: Path) -> str:
    """The document's, with these ports, as a user without rights can run it."""
    [block] = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL)
    servers = "".join(f"    server 127.0.0.1:{port} max_fails=0;\n" for port in ports)
    block = re.sub(r"(    server 10\.0\.0\.\d:8100 max_fails=0;\n)+", servers, block)
    block = block.replace("listen 8000;", f"listen 127.0.0.1:{listen};")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    return (
        f"daemon off;\npid {folder}/pid;\nerror_log stderr warn;\nworker_processes 1;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{block}}}\n"
    )


@contextmanager
def nginx(ports: list[int], folder: Path) -> Iterator[str]:
    """Its URL."""
    listen = free_port()
    path = folder / "nginx.conf"
    path.write_text(configuration(ports, listen, folder))
    with subprocess.Popen(["nginx", "-p", str(folder), "-c", str(path)], stderr=subprocess.PIPE) as process:
        try:
            url = f"http://127.0.0.1:{listen}"
            for _ in range(200):
                try:
                    httpx.get(f"{url}/health", timeout=5, trust_env=False)
                    break
                except httpx.HTTPError:
                    assert process.poll() is None, process.stderr and process.stderr.read()
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()


def start(model: Path, engine: ScriptedEngine, folder: Path, place: int) -> Service:
    port = free_port()
    options = ["--no-probe", "--tito-allowed-append-roles", "tool", "user", "--auth", "tokens"]
    options += ["--store", f"sqlite:{folder}/journal{place}"]
    command = sessions_command(model, upstream=engine.url, port=port, extra=options)
    environment = {"PACENOTE_AUTH_TOKENS": TOKEN["authorization"].removeprefix("Bearer ")}
    log = folder / f"sessions{place}.log"
    return Service(f"sessions {place}", command, url=f"http://127.0.0.1:{port}", log=log, env=environment)


def test_four_servers_one_of_which_dies(tiny_dir: Path, engine: ScriptedEngine, tmp_path: Path) -> None:
    with ExitStack() as stack, httpx.Client(timeout=WAIT, trust_env=False) as http:
        servers = [start(tiny_dir, engine, tmp_path, place) for place in range(COUNT)]
        for server in servers:
            stack.callback(server.stop)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(up, servers))
        url = stack.enter_context(nginx([int(server.url.rpartition(":")[2]) for server in servers], tmp_path))
        made = [http.post(f"{url}/sessions", headers=TOKEN).json() for _ in range(20)]
        keys = {entry["session_id"]: {"authorization": f"Bearer {entry['api_key']}"} for entry in made}
        keys |= {f"mine-{number}": TOKEN for number in range(30)}  # agents' own ids, started by a chat

        def ask(id: str, *messages: dict[str, Any]) -> httpx.Response:
            return http.post(f"{url}/sessions/{id}/v1/chat/completions", json={"messages": messages}, headers=keys[id])

        answers = {id: ask(id, USER).json()["choices"][0]["message"] for id in keys}
        where = {id: holder(http, servers, id) for id in keys}
        assert {place in where.values() for place in range(COUNT)} == {True}
        before = {id: http.post(f"{url}/sessions/{id}/samples", headers=TOKEN).content for id in keys}

        killed = where[made[0]["session_id"]]
        kill(servers[killed])
        status = {id: ask(id, USER, answers[id], MORE).status_code for id in keys}
        assert status == {id: 502 if where[id] == killed else 200 for id in keys}
        up(servers[killed])
        for id in keys:
            if where[id] == killed:
                assert http.post(f"{url}/sessions/{id}/samples", headers=TOKEN).content == before[id]
                assert ask(id, USER, answers[id], MORE).status_code == 200
            records = http.get(f"{url}/sessions/{id}", headers=TOKEN).json()["records"]
            assert [record["parent"] for record in records] == [None, 0]
            assert holder(http, servers, id) == where[id]


def up(server: Service) -> None:
    server.start()
    server.wait_healthy(WAIT)


def kill(server: Service) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.alive:
        time.sleep(0.01)


def holder(http: httpx.Client, servers: list[Service], id: str) -> int:
    """The only server that has turns of this session."""
    [place] = [
        place
        for place, server in enumerate(servers)
        if http.get(f"{server.url}/sessions/{id}", headers=TOKEN).json()["records"]
    ]
    return place
