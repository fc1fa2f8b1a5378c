"""Asking an engine how it is: health, weights, and which life it is in. SGLang's endpoints (0.5.23).

`/health` and `/health_generate` generate a token in SGLang (`SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false` makes
`/health` cheap) and answer within 20 s; a paused engine does not pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from pacenote.rollout.worker import Worker
from pacenote.rollout.worker_errors import EngineError, EngineGone, RoleMismatch, WrongWeights

_STARTED = ("instance_id", "startup_time", "random_seed", "pid")
_MODES = {"null": "regular", "none": "regular", "prefill": "prefill", "decode": "decode"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What an engine said about itself.

    Attributes:
        version: weight version that it serves.
        instance: fields of /server_info that differ from one start to the next; {} if it has none.
        role: that it runs in; None if it does not say.
        bootstrap_port: of a prefill engine; None if it does not say.
    """

    version: str
    instance: Mapping[str, str]
    role: str | None
    bootstrap_port: int | None

    def check(self, worker: Worker) -> None:
        """Refuse an engine that is not what the worker should be.

        Raises:
            RoleMismatch: another role or bootstrap port.
            WrongWeights: another weight version.
        """
        if self.role is not None and self.role != worker.role:
            mode = "null" if worker.role == "regular" else worker.role
            raise RoleMismatch(
                f"{worker.url} should be a {worker.role} worker, but the engine runs as {self.role}: start it with "
                f"--disaggregation-mode {mode}, or give --role {self.role}"
            )
        if None not in (self.bootstrap_port, worker.bootstrap_port) and self.bootstrap_port != worker.bootstrap_port:
            raise RoleMismatch(
                f"{worker.url} was given bootstrap port {worker.bootstrap_port}, but the engine's own is "
                f"{self.bootstrap_port}: give that one"
            )
        if self.version != worker.wanted:
            raise WrongWeights(
                f"expected {worker.url} to serve weight version {worker.wanted!r}, it serves {self.version!r}: "
                "give it its weights first"
            )


class Probe:
    """Asks engines. Threads may share it.

    Args:
        timeout: seconds for /health and the two infos.
        generate_timeout: seconds for /health_generate; SGLang itself gives up after 20.
    """

    def __init__(self, *, timeout: float = 5.0, generate_timeout: float = 30.0) -> None:
        # No idle connections: one that the engine closed meanwhile would look like a failure.
        self._client = httpx.Client(
            trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )
        self._timeout, self._generate_timeout = timeout, generate_timeout

    def health(self, url: str, *, generate: bool = False) -> None:
        """Returns if the engine is well.

        Args:
            generate: ask it to generate a token.

        Raises:
            EngineGone: nobody listens.
            EngineError: no answer in time, or another status than 200.
        """
        path, timeout = ("/health_generate", self._generate_timeout) if generate else ("/health", self._timeout)
        self._get(url + path, timeout)

    def version(self, url: str) -> str:
        """The weight version that it serves.

        Raises:
            EngineError: no answer, or none with a version.
        """
        version = self._info(url, "model_info").get("weight_version")
        if version is None:
            raise EngineError(f"expected a weight_version in {url}/model_info, got none: is this SGLang 0.5 or later?")
        return str(version)

    def look(self, url: str) -> Sight:
        """All that it says about itself.

        Raises:
            EngineError: no answer, or none as an engine gives.
        """
        info = self._info(url, "server_info")
        role = _MODES.get(str(info.get("disaggregation_mode")))
        port = info.get("disaggregation_bootstrap_port")
        return Sight(
            version=self.version(url),
            instance={name: json.dumps(info[name], sort_keys=True) for name in _STARTED if info.get(name) is not None},
            role=role,
            bootstrap_port=port if role == "prefill" and isinstance(port, int) else None,
        )

    def running(self, url: str) -> int:
        """Requests that run or wait.

        Raises:
            EngineError: no answer, or none as an engine gives.
        """
        loads = _object(self._get(url + "/v1/loads", self._timeout)).get("loads")
        entries = [entry for entry in loads if isinstance(entry, dict)] if isinstance(loads, list) else []
        counts = [entry.get("num_running_reqs", 0) + entry.get("num_waiting_reqs", 0) for entry in entries]
        if not counts:
            raise EngineError(f"expected loads in {url}/v1/loads, got none")
        return sum(counts)

    def _info(self, url: str, name: str) -> dict[str, Any]:
        response = self._get(f"{url}/{name}", self._timeout, known=False)
        if response.status_code == 404:
            response = self._get(f"{url}/get_{name}", self._timeout)  # the name in older releases
        return _object(response)

    def _get(self, where: str, timeout: float, *, known: bool = True) -> httpx.Response:
        try:
            response = self._client.get(where, timeout=timeout)
        except httpx.ConnectError as error:
            raise EngineGone(f"nobody listens at {where}: {error}") from error
        except httpx.TimeoutException as error:
            raise EngineError(f"no answer from {where} in time") from error
        except httpx.HTTPError as error:
            raise EngineError(f"no answer from {where}: {error or type(error).__name__}") from error
        if response.status_code != 200 and (known or response.status_code != 404):
            raise EngineError(f"expected 200 from {where}, got {response.status_code} {response.text[:200]!r}")
        return response


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise EngineError(f"expected a JSON object from {response.url}, got {response.text[:200]!r}")
    return body
