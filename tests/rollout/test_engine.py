"""Starting engines: the exact command of SGLang, a tree of processes that ends with its starter, Ray actors."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pacenote.rollout import tree
from pacenote.rollout.engine_cli import engine_command
from pacenote.rollout.launch import RESERVED_PORTS, Service
from pacenote.rollout.ray_launch import passed_on
from pacenote.rollout.sglang_command import EngineSpec, embedded_command, kept, sglang_command, words
from tests.rollout.gateways import SMG, gateway

WAIT = 60.0
PREFILL = EngineSpec(model="zai-org/GLM-4.7-Flash", role="prefill", bootstrap_port=8998, tp=4, ep=4)
FLAGS_0_5_23 = {
    "--context-length", "--disable-radix-cache", "--disaggregation-bootstrap-port", "--disaggregation-mode",
    "--disaggregation-transfer-backend", "--dist-init-addr", "--dp-size", "--dtype", "--enable-hierarchical-cache",
    "--enable-return-routed-experts", "--ep-size", "--host", "--max-running-requests", "--mem-fraction-static",
    "--model-path", "--nnodes", "--node-rank", "--port", "--reasoning-parser", "--served-model-name",
    "--tool-call-parser", "--tp-size", "--weight-version",
}  # fmt: skip
"""Flags of SGLang 0.5.23's ServerArgs that are used here, as read in its source."""


# --- the command -----------------------------------------------------------------------------------------------------


def test_commands() -> None:
    assert " ".join(sglang_command(replace(PREFILL, python="python"))) == (
        "python -m sglang.launch_server --model-path zai-org/GLM-4.7-Flash --host 0.0.0.0 --port 30000 "
        "--dtype bfloat16 --mem-fraction-static 0.85 --tp-size 4 --ep-size 4 --dp-size 1 --weight-version 0 "
        "--disaggregation-mode prefill --disaggregation-transfer-backend mooncake "
        "--disaggregation-bootstrap-port 8998 --enable-return-routed-experts"
    )
    decode = replace(PREFILL, role="decode", bootstrap_port=None, extra=("--log-level", "info"))
    assert "--disaggregation-bootstrap-port" not in sglang_command(decode)
    assert sglang_command(decode)[-2:] == ["--log-level", "info"]


def every() -> set[str]:
    """All flags that any spec gives."""
    full = EngineSpec(
        model="m", role="prefill", bootstrap_port=8998, tp=8, nodes=2, address="h:1", context_length=9, max_running=9,
        radix_cache=False, hicache=True, routes=False, tool_call_parser="a", reasoning_parser="b", served_model="c",
    )  # fmt: skip
    return {
        word for spec in (full, replace(full, routes=True, hicache=False)) for word in words(spec) if word[:2] == "--"
    }


def test_flags_are_sglangs() -> None:
    assert every() == FLAGS_0_5_23


def test_flags_are_in_the_installed_sglang() -> None:
    """Fields of ServerArgs in the source, where SGLang is installed beside."""
    roots = [Path(sys.prefix) / "sglang", *Path(sys.prefix).glob("lib/python*/site-packages/sglang")]
    files = [file for root in roots for file in root.rglob("arg_groups/fields/*.py")]
    if not files:
        pytest.skip("SGLang is not installed")
    fields = {
        node.target.id
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert {flag[2:].replace("-", "_") for flag in FLAGS_0_5_23} <= fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "prefill", "bootstrap_port": None}, "a bootstrap port for a prefill engine"),
        ({"role": "decode"}, "a bootstrap port for a prefill engine, and only there"),
        ({"role": "other"}, "expected a role"),
        ({"port": RESERVED_PORTS.start}, "outside 15000-17000"),
        ({"bootstrap_port": 16000}, "outside 15000-17000"),
        ({"bootstrap_port": 30000}, "two ports"),
        ({"port": 0}, "expected a port"),
        ({"ep": 3}, "ep to divide tp"),
        ({"tp": 0}, "expected tp of at least 1"),
        ({"nodes": 2}, "address HOST:PORT"),
        ({"nodes": 3, "address": "h:1"}, "nodes to divide tp"),
        ({"memory": 1.0}, "share of memory"),
        ({"hicache": True}, "hicache off while routes are returned"),
        ({"extra": ("--port", "1")}, "flags that are not decided here, got --port"),
        ({"extra": ("--enable-hierarchical-cache",)}, "not decided here"),
    ],
)
def test_what_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PREFILL, **changes)


def test_the_embedded_engine_is_one_process() -> None:
    with pytest.raises(ValueError, match="one process"):
        embedded_command(PREFILL)


def test_printed(capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["--model", "a model", "--print", "--python", "py", "--port", "30000"]
    assert engine_command([*usual, "--replicas", "2", "--", "--log-level", "info"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("py -m sglang.launch_server --model-path 'a model' --host 0.0.0.0 --port 30000 ")
    assert first.endswith("--enable-return-routed-experts --log-level info")
    assert "--port 30001" in second
    assert engine_command([*usual, "--role", "prefill"]) == 2
    assert "bootstrap port" in capsys.readouterr().err


# --- trees -----------------------------------------------------------------------------------------------------------

FAMILY = """
import os, subprocess, sys, time
apart = "import os, time; print(os.getpid(), flush=True); time.sleep(999)"
child = subprocess.Popen([sys.executable, "-c", apart], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
if sys.argv[1] == "stay":
    time.sleep(999)
os._exit(7)
"""


def pids(log: Path, count: int) -> list[int]:
    deadline = time.monotonic() + WAIT
    while len(found := log.read_text().split() if log.exists() else []) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(word) for word in found]


def gone(found: list[int]) -> bool:
    deadline = time.monotonic() + WAIT
    while any(alive(pid) for pid in found):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_service_ends_with_its_whole_tree(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Service("family", kept([sys.executable, "-c", FAMILY, "stay"]), url="http://x", log=log):
        found = pids(log, 3)
        assert all(alive(pid) for pid in found)
    assert gone(found)


def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Service("family", kept([sys.executable, "-c", FAMILY, "leave"]), url="http://x", log=log) as service:
        found = pids(log, 2)
        assert gone(found)
        deadline = time.monotonic() + WAIT
        while service.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        assert service.exit_code == 7


def test_a_tree_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    starter = (
        "import sys, time; from pathlib import Path\n"
        "from pacenote.rollout.launch import Service; from pacenote.rollout.sglang_command import kept\n"
        f"command = kept([sys.executable, '-c', {FAMILY!r}, 'stay'])\n"
        f"Service('family', command, url='http://x', log=Path({str(log)!r})).start()\n"
        "time.sleep(999)"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    try:
        found = pids(log, 3)
    finally:
        process.kill()
        process.wait()
    assert gone(found)


def test_a_program_that_is_not_there() -> None:
    done = subprocess.run(kept(["/no/such/program"]), capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "cannot start /no/such/program" in done.stderr
    assert tree.marked("nobody's") == []


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tiny_dir: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`pacenote engine` with an embedded engine behind a gateway, and the gateway's URL."""
    with gateway(SMG) as router:
        command = [sys.executable, "-m", "pacenote", "engine", "--backend", "embedded", "--model", str(tiny_dir)]
        command += ["--host", "127.0.0.1", "--port", "0", "--router", router.url, "--log-dir", str(tmp_path / "logs")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield process, router.url
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_is_registered_and_ends(
    started: tuple[subprocess.Popen[str], str], tmp_path: Path, number: signal.Signals
) -> None:
    process, router = started
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("regular engine on http://127.0.0.1:")
    assert line.endswith(f"registered at {router}\n")
    url = line.split()[3].rstrip(",")
    listed = httpx.get(f"{router}/workers", trust_env=False).json()["workers"]
    assert [entry["url"] for entry in listed] == [url]
    assert list((tmp_path / "logs").glob("regular-*.log"))
    os.kill(process.pid, number)
    process.wait(WAIT)
    assert process.returncode == (0 if number == signal.SIGTERM else -9)
    deadline = time.monotonic() + WAIT
    with contextlib.suppress(httpx.ConnectError):
        while time.monotonic() < deadline:
            httpx.get(f"{url}/health", trust_env=False, timeout=5)
            time.sleep(0.1)
        pytest.fail("the engine lives on")
    if number == signal.SIGTERM:
        assert until_none(router), "the gateway still has it"


def until_none(router: str) -> bool:
    """A gateway drains what is removed before it forgets it."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if not httpx.get(f"{router}/workers", trust_env=False).json()["workers"]:
            return True
        time.sleep(0.1)
    return False


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_variables_that_are_passed_on() -> None:
    given = {"PYTHONPATH": "a", "NCCL_DEBUG": "b", "HOME": "c", "MINE": "d", "SECRET": "e"}
    assert passed_on(given, ["MI*"]) == {"PYTHONPATH": "a", "NCCL_DEBUG": "b", "MINE": "d"}


RAY = """
import os, sys, json
from pacenote.rollout.ray_launch import RayEngines
from pacenote.rollout.sglang_command import EngineSpec
import ray
spec = EngineSpec(model=sys.argv[1], dtype="float32", context_length=64)
options = {"address": "local", "num_cpus": 2, "include_dashboard": False, "logging_level": "ERROR"}
with RayEngines([spec], backend="embedded", gpus=0, options=options, timeout=120) as engines:
    actor = engines.actors[0]
    print(json.dumps({"url": engines.urls[0], "where": ray.get(actor.where.remote("overridden")),
                      "log": ray.get(actor.tail.remote())}), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("number", [None, signal.SIGKILL], ids=["ends", "killed"])
def test_real_ray(tiny_dir: Path, tmp_path: Path, number: signal.Signals | None) -> None:
    """What the driver's PYTHONPATH overrides is what actor and engine import; the engine ends with its driver."""
    pytest.importorskip("ray")
    import json

    (tmp_path / "overridden.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import sys; print('sitecustomize of the driver', file=sys.stderr)\n")
    env = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", RAY, str(tiny_dir)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("{")), "")
        said = json.loads(line)
        port = int(said["url"].rpartition(":")[2])
        assert port not in RESERVED_PORTS
        assert said["where"] == str(tmp_path / "overridden.py")
        assert "sitecustomize of the driver" in said["log"]
        assert httpx.get(f"{said['url']}/health", trust_env=False).status_code == 200
        if number is None:
            process.communicate("\n", timeout=WAIT)
            assert process.returncode == 0
        else:
            process.kill()
        deadline = time.monotonic() + WAIT
        with contextlib.suppress(httpx.TransportError):
            while time.monotonic() < deadline:
                httpx.get(f"{said['url']}/health", trust_env=False, timeout=5)
                time.sleep(0.2)
            pytest.fail("the engine outlives its driver")
    finally:
        process.kill()
        process.wait()
