"""The command line of an SGLang server whose routes can be trained on. Flags: `ServerArgs` of SGLang 0.5.23."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pacenote.rollout.launch import RESERVED_PORTS
from pacenote.rollout.worker import ROLES


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """An engine to start.

    Attributes:
        model: directory, or a name in the hub.
        role: "regular", "prefill" or "decode".
        host, port: where it answers.
        bootstrap_port: where a prefill engine meets its decode engines.
        transfer: how keys and values travel in a pair: "mooncake", "mooncake_tcp" or "nixl".
        tp, ep, dp: ranks of tensor, expert and data parallelism; experts are spread over the ranks of tp.
        nodes, node, address: of an engine over several nodes: how many, which this is, and the first's HOST:PORT.
        dtype: of weights and activations.
        memory: share of a GPU's memory for weights, keys and values.
        context_length: longest request in tokens; None takes the model's.
        max_running: requests that generate at once; None lets SGLang choose.
        radix_cache: keep the keys and values of prefixes. Rows of a cached prefix are kept with it, and right.
        hicache: keep them in host memory as well. Refused: rows that come back from there are stale.
        tool_call_parser, reasoning_parser: SGLang's names; None leaves the text alone.
        served_model: the model's name in requests; None takes `model`.
        weight_version: name of the first weights.
        routes: return routed experts.
        python: that has SGLang.
        extra: more words of the command line.

    Raises:
        ValueError: what cannot work, or would lose routes.
    """

    model: str
    role: str = "regular"
    host: str = "0.0.0.0"
    port: int = 30000
    bootstrap_port: int | None = None
    transfer: str = "mooncake"
    tp: int = 1
    ep: int = 1
    dp: int = 1
    nodes: int = 1
    node: int = 0
    address: str | None = None
    dtype: str = "bfloat16"
    memory: float = 0.85
    context_length: int | None = None
    max_running: int | None = None
    radix_cache: bool = True
    hicache: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    served_model: str | None = None
    weight_version: str = "0"
    routes: bool = True
    python: str = sys.executable
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"expected a role of {', '.join(ROLES)}, got {self.role!r}")
        self._check_ports()
        for name in ("tp", "ep", "dp", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.tp % self.ep:
            raise ValueError(f"expected ep to divide tp, got ep {self.ep} and tp {self.tp}")
        if self.tp % self.nodes or not 0 <= self.node < self.nodes:
            raise ValueError(
                f"expected nodes to divide tp and a node below them, got tp {self.tp}, node {self.node} of {self.nodes}"
            )
        if (self.nodes > 1) != (self.address is not None):
            raise ValueError(
                "expected the first node's address HOST:PORT for an engine over several nodes, and only there"
            )
        if not 0 < self.memory < 1:
            raise ValueError(f"expected a share of memory between 0 and 1, got {self.memory}")
        if self.routes and self.hicache:
            raise ValueError(
                "expected hicache off while routes are returned: rows of a prefix that comes back from host memory are "
                "those of whoever used its place before"
            )
        self._check_extra()

    def _check_ports(self) -> None:
        if (self.role == "prefill") != (self.bootstrap_port is not None):
            raise ValueError(
                f"expected a bootstrap port for a prefill engine, and only there, got {self.bootstrap_port} for "
                f"{self.role}: give --bootstrap-port (8998 is SGLang's default)"
            )
        for name, port in (("port", self.port), ("bootstrap port", self.bootstrap_port)):
            if port is not None and (not 0 < port < 65536 or port in RESERVED_PORTS):
                raise ValueError(
                    f"expected a {name} of 1 to 65535 outside {RESERVED_PORTS.start}-{RESERVED_PORTS.stop - 1} "
                    f"(Mooncake's), got {port}"
                )
        if self.bootstrap_port == self.port:
            raise ValueError(f"expected two ports, got {self.port} twice")

    def _check_extra(self) -> None:
        own = {word for word in words(self) if word.startswith("--")}
        twice = sorted({word.split("=")[0] for word in self.extra} & (own | _FORBIDDEN))
        if twice:
            raise ValueError(f"expected flags that are not decided here, got {', '.join(twice)}")

    @property
    def url(self) -> str:
        """Base URL on this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host
        return f"http://{host}:{self.port}"


_FORBIDDEN = {
    "--enable-hierarchical-cache",
    "--disaggregation-mode",
    "--disable-radix-cache",
    "--nnodes",
    "--node-rank",
}


def words(spec: EngineSpec) -> list[str]:
    """Options and flags, without `extra`."""
    options: dict[str, object] = {
        "--model-path": spec.model,
        "--host": spec.host,
        "--port": spec.port,
        "--dtype": spec.dtype,
        "--mem-fraction-static": spec.memory,
        "--tp-size": spec.tp,
        "--ep-size": spec.ep,
        "--dp-size": spec.dp,
        "--context-length": spec.context_length,
        "--max-running-requests": spec.max_running,
        "--tool-call-parser": spec.tool_call_parser,
        "--reasoning-parser": spec.reasoning_parser,
        "--served-model-name": spec.served_model,
        "--weight-version": spec.weight_version,
    }
    if spec.nodes > 1:
        options |= {"--nnodes": spec.nodes, "--node-rank": spec.node, "--dist-init-addr": spec.address}
    if spec.role != "regular":
        options |= {
            "--disaggregation-mode": spec.role,
            "--disaggregation-transfer-backend": spec.transfer,
            "--disaggregation-bootstrap-port": spec.bootstrap_port,
        }
    flags = {
        "--enable-return-routed-experts": spec.routes,
        "--disable-radix-cache": not spec.radix_cache,
        "--enable-hierarchical-cache": spec.hicache,
    }
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    return given + [name for name, on in flags.items() if on]


def sglang_command(spec: EngineSpec) -> list[str]:
    """The whole command."""
    return [spec.python, "-m", "sglang.launch_server", *words(spec), *spec.extra]


def embedded_command(spec: EngineSpec) -> list[str]:
    """The same engine as the embedded one: small models, one process.

    Raises:
        ValueError: several ranks or nodes.
    """
    if spec.tp * spec.dp * spec.nodes > 1:
        raise ValueError("expected tp, dp and nodes of 1 for the embedded engine: it is one process")
    options: dict[str, object] = {
        "--model-path": spec.model,
        "--host": spec.host,
        "--port": spec.port,
        "--dtype": spec.dtype,
        "--context-length": spec.context_length,
        "--max-running-requests": spec.max_running,
        "--tool-call-parser": spec.tool_call_parser,
        "--reasoning-parser": spec.reasoning_parser,
        "--served-model-name": spec.served_model,
        "--weight-version": spec.weight_version,
        "--disaggregation-mode": None if spec.role == "regular" else spec.role,
        "--disaggregation-bootstrap-port": spec.bootstrap_port,
    }
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    return [spec.python, "-m", "pacenote.rollout.embedded", *given, *spec.extra]


def kept(command: Sequence[str]) -> list[str]:
    """The command under `keeper`: all that it starts ends with it."""
    return [sys.executable, "-m", "pacenote.rollout.keeper", *command]
