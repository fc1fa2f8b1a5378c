"""A run over a prefill/decode pair: whole routes, and new weights on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from pacenote.kernels.spec import CACHED, DECODE, PREFILL
from pacenote.rollout.launch import Service, engine_command, free_port
from pacenote.trainer import recipes, sync
from pacenote.trainer.cli import main
from pacenote.trainer.fleet import Fleet
from pacenote.trainer.game import Game
from pacenote.trainer.model import build_tiny
from pacenote.trainer.rollout_config import RolloutConfig
from pacenote.trainer.rollouts import Rollouts
from pacenote.trainer.sync import SyncConfig
from pacenote.trainer.watch import Watch

pytestmark = pytest.mark.road


@dataclass(frozen=True)
class Engines:
    """A pair of embedded engines."""

    prefill: str
    decode: str
    said: str


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    root, bootstrap = tmp_path_factory.mktemp("pair"), free_port()
    build_tiny(root / "model", seed=0)
    roles = {"prefill": ["--disaggregation-bootstrap-port", str(bootstrap)], "decode": []}
    urls = {}
    with ExitStack() as stack:
        services = []
        for role, words in roles.items():
            port = free_port()
            extra = ["--disaggregation-mode", role, *words]
            command = engine_command(root / "model", port=port, served_model_name="tiny", dtype="float32", extra=extra)
            urls[role] = f"http://127.0.0.1:{port}"
            services.append(stack.enter_context(Service(role, command, url=urls[role], log=root / f"{role}.log")))
        for service in services:
            service.wait_healthy(120)
        yield Engines(urls["prefill"], urls["decode"], f"{urls['prefill']},{bootstrap},{urls['decode']}")


def test_routes_are_whole_and_weights_reach_both(engines: Engines, tmp_path: Path) -> None:
    for version in (0, 1):
        build_tiny(sync.weights_path(tmp_path, version), seed=version)
    config = RolloutConfig(pairs=(engines.said,), prompts=2, group=2, served_model="tiny", request_timeout=60)
    push = SyncConfig(method="disk", pause="retract")
    game = Game.load(recipes.tiny())
    with Fleet(config, weights=tmp_path, logs=tmp_path, seed=0, device="cpu", push=push) as fleet:
        fleet.start(0)
        assert fleet.taking_weights == (engines.prefill, engines.decode)
        with Rollouts(game, config, sessions=fleet.sessions_url, seed=1) as rollouts:
            for version in (0, 1):
                fleet.serve(sync.saved_weights(sync.weights_path(tmp_path, version)), version)
                for url in (engines.prefill, engines.decode):
                    assert httpx.get(f"{url}/model_info").json()["weight_version"] == str(version)
                for episode in rollouts.take(version, Watch()).episodes:
                    for sample in episode.trajectories:
                        assert sample.experts is not None
                        assert set(sample.version[sample.loss_mask.astype(bool)].tolist()) == {version}
                        assert set(sample.provenance.tolist()) <= {PREFILL, DECODE, CACHED}
                        assert (sample.experts.max(-1) > 0).all(), "a row of zeros"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rollout.pairs", "auto"], "--rollout.pairs auto expects --rollout.upstream"),
        (["--rollout.pairs", "http://a"], "PREFILL_URL,BOOTSTRAP_PORT"),
        (["--rollout.served-model", "x"], "--rollout.served-model expects --rollout.upstream"),
        (["--engine", "sglang-cpu", "--rollout.pairs", "http://a,1,http://b"], "leave one out"),
    ],
)
def test_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "tiny", *words])
    assert says in capsys.readouterr().err
