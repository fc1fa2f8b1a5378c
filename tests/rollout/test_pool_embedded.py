"""The pool over a real engine and a real gateway: traffic, an exchange of weights, a kill, and a return with them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from pacenote.rollout.launch import Service, engine_command, free_port
from pacenote.rollout.lifecycle import PoolConfig
from pacenote.rollout.pool import WorkerPool
from pacenote.rollout.worker import State, Worker
from pacenote.rollout.worker_errors import IncompletePool
from tests.rollout.gateways import SMG, gateway

CONFIG = PoolConfig(generate_every=1e-6, fail_after=2, return_after=1)


@pytest.mark.road
def test_a_real_engine(tiny_dir: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "engine.log"

    def engine(version: str) -> Service:
        command = engine_command(
            tiny_dir, port=port, served_model_name="tiny", context_length=64, dtype="float32", weight_version=version
        )
        return Service("engine", command, url=f"http://127.0.0.1:{port}", log=log)

    lives = [engine("1")]

    def restart(worker: Worker) -> None:
        lives[-1].stop()
        lives.append(engine(worker.wanted))
        lives[-1].start()
        lives[-1].wait_healthy(120)

    try:
        lives[0].start()
        with gateway(SMG) as service, httpx.Client(base_url=service.url, trust_env=False, timeout=60) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

            def version() -> str:
                answer = client.post("/v1/chat/completions", json={**body, "return_meta_info": True})
                assert answer.status_code == 200, answer.text
                found: str = answer.json()["choices"][0]["meta_info"]["weight_version"]
                return found

            lives[0].wait_healthy(120)
            with WorkerPool(service.url, weight_version="1", config=CONFIG, restart=restart) as pool:
                worker = pool.add(lives[0].url)
                assert "instance_id" in worker.instance
                assert version() == "1"
                with pool.updating("2"):
                    new = {"model_path": str(tiny_dir), "weight_version": "2"}
                    httpx.post(f"{worker.url}/update_weights_from_disk", json=new, trust_env=False, timeout=60)
                assert pool.is_current(worker.url, worker.incarnation)
                assert version() == "2"
                assert lives[0].pid is not None
                os.kill(lives[0].pid, signal.SIGKILL)
                for _ in range(2):
                    pool.check(worker.url)
                with pytest.raises(IncompletePool, match="nobody listens"):
                    pool.serving()
                assert client.post("/v1/chat/completions", json=body).status_code >= 400  # off the gateway
                pool.check(worker.url)
                assert len(lives) == 2
                after = pool.check(worker.url)
                assert after is not None
                assert after.state is State.CURRENT
                assert not pool.is_current(worker.url, worker.incarnation)
                assert version() == "2"
    finally:
        for life in lives:
            life.stop()
