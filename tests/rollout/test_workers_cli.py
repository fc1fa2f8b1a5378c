"""`pacenote workers`: output and exit statuses, at real gateways."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pacenote.rollout.launch import free_port
from pacenote.rollout.workers_cli import KEY_VARIABLE
from pacenote.trainer.cli import main
from tests.rollout.gateways import ROUTER_021, ROUTER_032, gateway
from tests.rollout.stand_in import StandIn
from tests.rollout.stand_in_router import StandInRouter

Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def router() -> Iterator[str]:
    with gateway(ROUTER_032) as service:
        yield service.url


def run(*words: str) -> int:
    return main(["workers", *words])


def test_add_list_remove(router: str, capsys: Out) -> None:
    with StandIn("prefill") as prefill, StandIn("decode", version="7") as decode:
        assert run("add", prefill.url, "--role", "prefill", "--bootstrap-port", "8998", "--router", router) == 0
        assert "as a prefill worker; it serves weights 1; none were asked for" in capsys.readouterr().out
        assert run("list", "--router", router) == 0
        text = capsys.readouterr().out
        assert f"prefill      {prefill.url}  healthy bootstrap port 8998" in text
        assert "1 workers at" in text
        assert "INCOMPLETE: prefill without decode" in text
        pair = ("add", decode.url, "--role", "decode", "--router", router, "--weight-version")
        assert run(*pair, "8") == 1
        assert "to serve weight version '8', it serves '7'" in capsys.readouterr().err
        assert run(*pair, "7", "--json") == 0
        added = json.loads(capsys.readouterr().out)
        assert (added["state"], added["weight_version"], added["role"]) == ("current", "7", "decode")
        assert run("list", "--router", router, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["dialect"] == "workers"
        assert {w["url"]: w["role"] for w in found["workers"]} == {prefill.url: "prefill", decode.url: "decode"}
        for engine in (prefill, decode):
            assert run("remove", engine.url, "--router", router) == 0
        capsys.readouterr()
        assert run("remove", decode.url, "--router", router) == 1
        assert "does not list" in capsys.readouterr().err


def test_what_is_refused(router: str, capsys: Out) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    assert run("add", nobody, "--role", "prefill", "--router", router) == 2
    assert "needs its bootstrap port" in capsys.readouterr().err
    assert run("add", "nowhere", "--router", router) == 2
    assert "expected a URL http://HOST:PORT" in capsys.readouterr().err
    assert run("add", nobody, "--router", router) == 1
    assert "nobody listens" in capsys.readouterr().err
    assert run("list", "--router", nobody, "--timeout", "1") == 1
    assert "no answer from the router" in capsys.readouterr().err
    assert run("list") == 2
    assert run() == 2
    assert run("--help") == 0
    assert run("watch", "--router", router) == 2
    assert "expected workers to watch" in capsys.readouterr().err
    assert run("watch", nobody, "--router", router) == 2
    assert "no answer from any: give --weight-version" in capsys.readouterr().err
    assert run("watch", f"{nobody},prefill,x", "--router", router) == 2
    assert "URL[,ROLE[,BOOTSTRAP_PORT]]" in capsys.readouterr().err


def test_a_prefill_worker_that_became_regular(capsys: Out) -> None:
    with gateway(ROUTER_021) as service, StandIn("prefill") as prefill:
        words = ("add", prefill.url, "--role", "prefill", "--bootstrap-port", "8998", "--router", service.url)
        assert run(*words, "--dialect", "add_worker") == 1
        assert "it was removed again" in capsys.readouterr().err
        assert run(*words) == 0  # its other dialect keeps the role


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with StandInRouter() as there:
        monkeypatch.setenv(KEY_VARIABLE, "secret")
        assert run("list", "--router", there.url) == 0
        assert there.auth == {"Bearer secret"}


def test_watch_once(router: str, tmp_path: Path, capsys: Out) -> None:
    with StandIn("prefill") as prefill, StandIn("decode") as decode, StandIn() as sick:
        file = tmp_path / "workers"
        file.write_text(f"# the pair\n{prefill.url},prefill,8998\n\n{decode.url},decode # second\n")
        assert run("watch", "--file", str(file), "--router", router, "--once") == 0
        assert f"{decode.url} decode: current" in capsys.readouterr().out
        assert run("watch", "--router", router, "--once", "--json") == 0  # what the router lists
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {w["url"] for w in lines if w["state"] == "current"} == {prefill.url, decode.url}
        sick.sick = True
        assert run("watch", "--file", str(file), sick.url, "--router", router, "--once") == 1
        assert f"not current: {sick.url}" in capsys.readouterr().err


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the test."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_ends_and_leaves_workers_where_they_are(number: signal.Signals) -> None:
    with StandInRouter() as there, StandIn() as engine:
        command = [sys.executable, "-m", "pacenote", "workers", "watch", engine.url, "--router", there.url]
        with started([*command, "--every", "0.05"]) as process:
            assert process.stdout is not None

            def until(state: str) -> None:
                assert process.stdout is not None
                assert any(state in line for line in process.stdout), state

            until(": current")
            engine.sick = True
            until("quarantined (3 health checks in a row failed")
            eventually(lambda: there.workers == {})  # it is said first, and then done
            engine.sick = False
            until(": current")
            process.send_signal(number)
            assert process.wait(30) == 0
        assert list(there.workers) == [engine.url]
