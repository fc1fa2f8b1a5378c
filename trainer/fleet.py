"""The servers that a run talks to: an engine (embedded here, or somebody's) and the session server in front of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

import httpx

from pacenote.rollout.launch import Service, ServiceError, engine_command, free_port, sessions_command
from pacenote.rollout.pairs import AUTO, Pair
from pacenote.rollout.sglang_cpu import cpu_command, cpu_environment, find_python
from pacenote.trainer import sync
from pacenote.trainer.errors import EngineDied, TrainerError
from pacenote.trainer.rollout_config import RolloutConfig

START_TIMEOUT = 180.0  # seconds; a cold import of torch and transformers on a busy machine takes tens of them
EngineKind = Literal["embedded", "sglang-cpu"]
GRACE = 2.0  # seconds between an answer that failed and the process that is seen dead


class Fleet:
    """Starts the servers, gives the engine its weights, restarts it when it dies, stops what it started."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        weights: Path,
        logs: Path,
        seed: int,
        device: str,
        exact: bool = False,
        engine: EngineKind = "embedded",
        push: sync.SyncConfig | None = None,
    ) -> None:
        """Remember what to start (`device` is the trainer's, and so is the format of an `exact` engine's weights);
        nothing runs before `start`."""
        self.engine = engine
        self.config, self.weights, self.logs, self.seed, self.exact = config, weights, logs, seed, exact
        self.device = device if config.engine_device == "auto" else config.engine_device
        self.push = push or sync.SyncConfig()
        self.serving: int | None = None
        self.restarts = 0
        self._engine: Service | None = None
        self._sessions: Service | None = None

    def start(self, version: int) -> None:
        """Start the engine with the weights of `version` and the session server; returns when both answer.

        Raises:
            TrainerError: a server did not come up; the last lines of its log are in the message.
        """
        model = sync.weights_path(self.weights, version)
        if self._upstream is None:
            self._engine = self._start_engine(model, version, self.config.engine_port or free_port())
            self.serving = version
        port = self.config.session_port or free_port()
        roles = ("--tito-allowed-append-roles", *self.config.append_roles)
        options = [*roles, "--drain", "1"]  # at the end of a run nobody waits for an answer
        options += ["--timeout", str(self.config.request_timeout)]
        for pair in self.config.pairs:
            options += ["--pair", pair]
        if self.config.served_model is not None:
            options += ["--served-model", self.config.served_model]
        command = sessions_command(model, upstream=self.engine_url, port=port, extra=options)
        self._sessions = _start("the session server", command, port, self.logs / "sessions.log")
        if self._engine is not None:
            _wait(self._engine)
        _wait(self._sessions)

    @property
    def engine_url(self) -> str:
        """Where chats go."""
        url = self._upstream if self._engine is None else self._engine.url
        assert url is not None, "start() comes first"
        return url.rstrip("/")

    @property
    def taking_weights(self) -> tuple[str, ...]:
        """Engines that are given new weights."""
        if self.config.engines:
            return self.config.engines
        return tuple(url for pair in self._pairs for url in (pair.prefill, pair.decode)) or (self.engine_url,)

    @property
    def _pairs(self) -> list[Pair]:
        return [Pair.read(said) for said in self.config.pairs if said != AUTO]

    @property
    def _upstream(self) -> str | None:
        """Somebody's engine or gateway; a pair's decode side answers for it."""
        return self.config.upstream or next((pair.decode for pair in self._pairs), None)

    @property
    def sessions_url(self) -> str:
        """Where agents go."""
        assert self._sessions is not None, "start() comes first"
        return self._sessions.url

    def serve(self, weights: sync.Weights, version: int) -> None:
        """Make every engine serve the weights of `version`, if they do not yet.

        Raises:
            EngineDied: one did not answer.
            StaleWeights: one refused them.
        """
        if self.serving != version:
            sync.push(self.taking_weights, weights, version, self.push)
            self.serving = version

    def check(self) -> None:
        """Raise if a server of ours is no longer running.

        Raises:
            EngineDied: the engine's process ended.
            TrainerError: the session server's process ended.
        """
        if self._engine is not None and not self._engine.alive:
            raise EngineDied(f"the engine's process ended; its last words are in {self._engine.log}")
        if self._sessions is not None and not self._sessions.alive:
            raise TrainerError(f"the session server's process ended; its last words are in {self._sessions.log}")

    def revive(self, path: Path, version: int, cause: EngineDied) -> None:
        """Start the engine again, on its old port, with the weights of `version`; one that hangs is killed first.

        Raises:
            EngineDied: `cause`, if the engine is not ours to restart, still answers, or died too often.
        """
        if self._engine is None:
            raise cause
        deadline = time.monotonic() + GRACE
        while self._engine.alive and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._engine.alive and _answers(self._engine):
            raise cause
        if self.restarts >= self.config.restarts:
            raise EngineDied(f"{cause}; it was started again {self.restarts} times, which is the limit") from cause
        self.restarts += 1
        port = int(self._engine.url.rsplit(":", 1)[1])
        self._engine.stop()
        self._engine = self._start_engine(path, version, port)
        _wait(self._engine)
        self.serving = version

    def __enter__(self) -> Fleet:
        """The fleet itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the servers."""
        for service in (self._sessions, self._engine):
            if service is not None:
                service.stop()

    def _start_engine(self, model: Path, version: int, port: int) -> Service:
        log = self.logs / "engine.log"
        if self.engine == "sglang-cpu":
            command = cpu_command(
                find_python(),
                model,
                port=port,
                dtype=self.config.engine_dtype,
                weight_version=str(version),
                random_seed=self.seed,
                max_running_requests=min(self.config.concurrency, 128),
            )
            return _start("SGLang", command, port, log, env=cpu_environment(self.config.engine_threads))
        command = engine_command(
            model,
            port=port,
            dtype="float32" if self.exact else self.config.engine_dtype,
            device=self.device,
            weight_version=str(version),
            threads=self.config.engine_threads,
            random_seed=self.seed,
            max_running_requests=min(self.config.concurrency, 128),
            exact=self.exact,
        )
        return _start("the engine", command, port, log)


def check_engine(engine: EngineKind) -> None:
    """Before anything else is done.

    Raises:
        ValueError: what this machine should serve with is not installed; the text says how to install it.
    """
    if engine == "sglang-cpu":
        try:
            find_python()
        except ServiceError as error:
            raise ValueError(f"--engine sglang-cpu: {error}") from error


def _start(name: str, command: list[str], port: int, log: Path, env: Mapping[str, str] | None = None) -> Service:
    service = Service(name, command, url=f"http://127.0.0.1:{port}", log=log, env=env)
    try:
        service.start()
    except ServiceError as error:
        raise TrainerError(str(error)) from error
    return service


def _answers(service: Service) -> bool:
    """Whether it says within a few seconds that it is well."""
    try:
        return httpx.get(f"{service.url}/health", timeout=GRACE, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _wait(service: Service) -> None:
    try:
        service.wait_healthy(START_TIMEOUT)
    except ServiceError as error:
        raise TrainerError(f"{service.name} did not come up; {_reason(error)} (log: {service.log})") from error


def _reason(error: ServiceError) -> str:
    """The last line of a service's last words: its own one-sentence reason, where it gave one."""
    return str(error).strip().splitlines()[-1]
