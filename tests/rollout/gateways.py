"""SGLang's published gateways as processes on loopback: real binaries, where scripts/install.py puts them."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pacenote.rollout.launch import Service, free_port

SMG = "smg==1.13.0"
ROUTER_032, ROUTER_021, ROUTER_019 = "sglang-router==0.3.2", "sglang-router==0.2.1", "sglang-router==0.1.9"
_MODULES = {
    SMG: ("smg.cli", "launch", "--disable-tokenizer-autoload", "--shutdown-grace-period-secs", "1"),
    ROUTER_032: ("sglang_router.launch_router", "--disable-retries"),
    ROUTER_021: ("sglang_router.launch_router", "--disable-retries"),
    ROUTER_019: ("sglang_router.launch_router",),
}
GATEWAYS = tuple(_MODULES)


@contextmanager
def gateway(release: str, *flags: str, policy: str = "round_robin") -> Iterator[Service]:
    """A running gateway without workers; skips the test where the release is not installed.

    Args:
        release: one of GATEWAYS.
        flags: more of its command line, for example "--pd-disaggregation".
        policy: which worker a request goes to.
    """
    folder = Path(sys.prefix) / "gateways" / release
    if not folder.is_dir():
        pytest.skip(f"{release} is not installed")
    module, *words = _MODULES[release]
    port, metrics = free_port(), free_port()
    command = [sys.executable, "-m", module, *words, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", policy, "--prometheus-port", str(metrics), *flags]
    with (
        tempfile.TemporaryDirectory() as logs,
        Service(
            release,
            command,
            url=f"http://127.0.0.1:{port}",
            log=Path(logs) / "gateway.log",
            env={"PYTHONPATH": str(folder)},
        ) as service,
    ):
        service.wait_healthy(30.0)
        yield service


def register(router: Service, worker: dict[str, Any]) -> None:
    """At a gateway; returns once it routes to it."""
    httpx.post(f"{router.url}/workers", json=worker, trust_env=False).raise_for_status()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        listed = httpx.get(f"{router.url}/workers", trust_env=False).json()["workers"]
        if any(entry["url"] == worker["url"] and entry["is_healthy"] for entry in listed):
            return
        time.sleep(0.05)
    pytest.fail(f"{worker} was not registered: {listed}")
