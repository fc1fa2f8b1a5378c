"""Engines as Ray actors: each starts its engine on its own node, and ends it with itself.

The driver's PYTHONPATH and the listed variables reach actors and engines, or they would import another copy of what the
driver overrides. Needs the `ray` extra.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

from pacenote.rollout.launch import Service, ServiceError, free_port
from pacenote.rollout.sglang_command import EngineSpec, embedded_command, kept, sglang_command

VARIABLES = (
    "PYTHONPATH", "LD_LIBRARY_PATH", "HF_*", "TRANSFORMERS_*", "TOKENIZERS_PARALLELISM", "NCCL_*", "GLOO_*",
    "SGLANG_*", "MC_*", "OMP_NUM_THREADS", "TRITON_*",
)  # fmt: skip
"""Variables of the driver that actors get, as shell patterns."""


def passed_on(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The variables of VARIABLES, and those of `more` patterns."""
    patterns = (*VARIABLES, *more)
    return {name: value for name, value in environment.items() if any(fnmatch(name, p) for p in patterns)}


class EngineActor:
    """Runs one engine on the node that Ray puts it on.

    Args:
        spec: its host and port are chosen on the node.
        backend: "sglang" or "embedded".
    """

    def __init__(self, spec: EngineSpec, backend: str) -> None:
        import ray

        node = ray.util.get_node_ip_address()
        spec = replace(spec, host=node, port=free_port())
        command = sglang_command(spec) if backend == "sglang" else embedded_command(spec)
        log = Path(tempfile.mkdtemp(prefix="pacenote-engine-")) / "engine.log"
        self._service = Service(f"{spec.role} engine on {node}", kept(command), url=spec.url, log=log)
        self._service.start()

    def wait(self, timeout: float) -> str:
        """Base URL, once it is healthy.

        Raises:
            ServiceError: it ended, or did not become healthy.
        """
        self._service.wait_healthy(timeout)
        return self._service.url

    def check(self) -> None:
        """Raise ServiceError if it has ended."""
        self._service.check()

    def where(self, module: str) -> str | None:
        """The file that an import gives here; what the driver overrides is overridden."""
        from importlib import import_module

        return import_module(module).__file__

    def tail(self) -> str:
        """The engine's last words."""
        return self._service.tail()

    def stop(self) -> None:
        """End the engine with all that it started."""
        self._service.stop()


class RayEngines:
    """Engines on a cluster, for the length of a `with`.

    Args:
        specs: one an engine.
        backend: "sglang" or "embedded".
        gpus: of one engine.
        address: of the cluster; "auto" finds it, "local" starts one here.
        variables: more patterns of variables to pass on.
        timeout: seconds until an engine must be healthy.
        options: more of `ray.init`.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        *,
        backend: str = "sglang",
        gpus: float = 1.0,
        address: str = "auto",
        variables: Sequence[str] = (),
        timeout: float = 1800.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._specs, self._backend, self._gpus, self._timeout = list(specs), backend, gpus, timeout
        self._init = {"address": address, **(options or {})}
        self._init["runtime_env"] = {"env_vars": passed_on(os.environ, variables)}
        self.actors: list[Any] = []
        self.urls: list[str] = []

    def __enter__(self) -> RayEngines:
        """Connect and start them; their `urls` are healthy.

        Raises:
            ServiceError: Ray is not installed, or an engine did not start.
        """
        try:
            import ray
        except ImportError as error:
            raise ServiceError(f"expected Ray for --ray: pip install 'pacenote[ray]' ({error})") from error
        if not ray.is_initialized():
            ray.init(**self._init)
        try:
            remote = ray.remote(num_gpus=self._gpus)(EngineActor)
            self.actors = [remote.remote(spec, self._backend) for spec in self._specs]
            self.urls = ray.get([actor.wait.remote(self._timeout) for actor in self.actors])
        except ray.exceptions.RayError as error:
            self._end()
            raise ServiceError(f"an engine did not start on the cluster: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End them, and the connection."""
        self._end()

    def check(self) -> None:
        """Raise ServiceError if one has ended."""
        import ray

        try:
            ray.get([actor.check.remote() for actor in self.actors])
        except ray.exceptions.RayError as error:
            raise ServiceError(f"an engine on the cluster ended: {error}") from error

    def _end(self) -> None:
        import ray

        for actor in self.actors:
            with contextlib.suppress(ray.exceptions.RayError):  # it is gone already, and its engine with it
                ray.get(actor.stop.remote(), timeout=30)
            ray.kill(actor)
        self.actors = []
        ray.shutdown()
