"""Service processes: health, death, stop, ports, and children that do not outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pacenote.rollout.launch import Service, ServiceError, engine_command, free_port, sessions_command

SERVER = """
import http.server, sys
from pacenote.rollout.launch import exit_with_parent
exit_with_parent(0.05)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 503); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def _service(tmp_path: Path, code: str, *arguments: str, port: int = 1) -> Service:
    command = [sys.executable, "-c", code, *arguments]
    return Service("helper", command, url=f"http://127.0.0.1:{port}", log=tmp_path / "logs" / "helper.log")


def _gone(pid: int, timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_start_health_and_stop(tmp_path: Path) -> None:
    port = free_port()
    with _service(tmp_path, SERVER, str(port), port=port) as service:
        service.wait_healthy(20)
        service.check()
        assert service.pid is not None
        assert os.getsid(service.pid) == service.pid != os.getsid(0)
        with pytest.raises(ServiceError, match="already runs"):
            service.start()
        with pytest.raises(ServiceError, match=r"did not answer .*/other in 0\.2 s"):
            service.wait_healthy(0.2, path="/other")
    assert not service.alive
    service.stop()
    with service:  # it can be started again
        service.wait_healthy(20)


def test_a_child_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    service = _service(tmp_path, "import sys; print('no model here'); sys.exit(3)")
    service.start()
    with pytest.raises(ServiceError, match=r"helper ended with exit code 3.*\nno model here"):
        service.wait_healthy(20)
    with pytest.raises(ServiceError, match="no model here"):
        service.check()
    service.stop()


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    service = Service("helper", ["/no/such/program"], url="http://127.0.0.1:1", log=tmp_path / "log")
    with pytest.raises(ServiceError, match="cannot start helper"):
        service.start()
    assert not service.alive


def test_stop_kills_a_stubborn_process_and_its_children(tmp_path: Path) -> None:
    service = _service(tmp_path, STUBBORN)
    service.start()
    deadline = time.monotonic() + 20
    while not service.tail() and time.monotonic() < deadline:
        time.sleep(0.02)
    grandchild, pid = int(service.tail()), service.pid
    assert pid is not None
    service.stop(grace=0.2)
    assert _gone(pid)
    assert _gone(grandchild)


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    port = free_port()
    parent = f"""
import sys, time
from pathlib import Path
from pacenote.rollout.launch import Service
service = Service("helper", [sys.executable, "-c", {SERVER!r}, "{port}"], url="http://127.0.0.1:{port}",
                  log=Path({str(tmp_path / "log")!r}))
service.start(); service.wait_healthy(20); print(service.pid, flush=True); time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert _gone(child)


def test_the_log_keeps_only_its_tail_in_messages(tmp_path: Path) -> None:
    service = _service(tmp_path, "pass")
    assert service.tail() == ""
    service.log.parent.mkdir()
    service.log.write_text("".join(f"line {index}\n" for index in range(5000)))
    assert service.tail(2) == "line 4998\nline 4999"


def test_free_ports_keep_clear_of_reserved_ones() -> None:
    assert all(not 15000 <= free_port() <= 17000 for _ in range(20))


def test_commands() -> None:
    command = engine_command(Path("model"), port=5, context_length=128, extra=["--reasoning-parser", "glm45"])
    assert command[:3] == [sys.executable, "-m", "pacenote.rollout.embedded"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--port"] == "5"
    assert options["--context-length"] == "128"
    assert options["--reasoning-parser"] == "glm45"
    assert "--served-model-name" not in options
    sessions = sessions_command(Path("model"), upstream="http://h:1", port=6)
    assert sessions[2:] == ["pacenote.rollout.server", "--model", "model", "--upstream", "http://h:1", "--port", "6"]
