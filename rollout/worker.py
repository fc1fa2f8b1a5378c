"""One worker: an engine behind a router, and where it is in its life.

    starting -> registered -> confirmed -> current -> draining -> gone        and quarantined, from where it may return

`starting`: not at the router; its weights are being verified. `registered`: the router accepted it. `confirmed`: the
router's listing shows it, healthy and in its role. `current`: its weights and its incarnation were verified once more
after that; only now is it given work. `quarantined`: taken off the router. A worker is at the router only while it was
seen to serve the weights that it should: the type refuses anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

ROLES = ("regular", "prefill", "decode")


class State(StrEnum):
    """Where a worker is in its life; see the module."""

    STARTING = "starting"
    REGISTERED = "registered"
    CONFIRMED = "confirmed"
    CURRENT = "current"
    QUARANTINED = "quarantined"
    DRAINING = "draining"
    GONE = "gone"


AT_ROUTER = frozenset({State.REGISTERED, State.CONFIRMED, State.CURRENT})
_BACK = {State.STARTING, State.QUARANTINED, State.DRAINING}
NEXT: Mapping[State, frozenset[State]] = {
    State.STARTING: frozenset({State.REGISTERED, State.QUARANTINED, State.DRAINING}),
    State.REGISTERED: frozenset({State.CONFIRMED, *_BACK}),
    State.CONFIRMED: frozenset({State.CURRENT, *_BACK}),
    State.CURRENT: frozenset(_BACK),
    State.QUARANTINED: frozenset({State.STARTING, State.DRAINING}),
    State.DRAINING: frozenset({State.GONE}),
    State.GONE: frozenset(),
}
"""Legal transitions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker as it was at one moment; a change makes a new one (`to`).

    Attributes:
        url: base URL of the engine, without a trailing slash.
        role: "regular", "prefill" or "decode".
        bootstrap_port: where a prefill engine meets its decode engines; None for the other roles.
        incarnation: number of this life of the engine. It is new whenever the engine was started again or the worker
            was added again, and no number comes twice in a pool: an answer that was asked of another one is late.
        wanted: weight version that it should serve.
        seen: weight version that it said it serves; None before it was asked.
        state: see the module.
        instance: what the engine says about its own start; tells one life from the next.
        failures: health checks that failed in a row.
        successes: health checks in a row that went well while quarantined.
        restarts: how often it was restarted since it was last current.
        reason: why it is not current; "" if it is.

    Raises:
        ValueError: a URL, a role or a port that does not fit, or a state at the router with unverified weights.
    """

    url: str
    role: str = "regular"
    bootstrap_port: int | None = None
    incarnation: int = 0
    wanted: str
    seen: str | None = None
    state: State = State.STARTING
    instance: Mapping[str, str] = field(default_factory=dict)
    failures: int = 0
    successes: int = 0
    restarts: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", worker_url(self.url))
        if self.role not in ROLES:
            raise ValueError(f"expected a role of {', '.join(ROLES)} for {self.url}, got {self.role!r}")
        if self.role == "prefill" and self.bootstrap_port is None:
            raise ValueError(
                f"a prefill worker needs its bootstrap port, got none for {self.url}: give the engine's "
                "--disaggregation-bootstrap-port (SGLang's default is 8998) as bootstrap_port, or --bootstrap-port"
            )
        if self.role != "prefill" and self.bootstrap_port is not None:
            raise ValueError(
                f"only a prefill worker has a bootstrap port, got {self.bootstrap_port} for {self.url}, a "
                f"{self.role} worker: leave it out, or give role prefill"
            )
        if self.bootstrap_port is not None and not 0 < self.bootstrap_port < 65536:
            raise ValueError(f"expected a bootstrap port of 1 to 65535 for {self.url}, got {self.bootstrap_port}")
        if self.at_router and not self.verified:
            raise ValueError(
                f"{self.url} cannot be {self.state}: it should serve weight version {self.wanted!r} and was seen to "
                f"serve {self.seen!r}"
            )

    @property
    def verified(self) -> bool:
        """Whether it was seen to serve the weights that it should."""
        return self.seen == self.wanted

    @property
    def at_router(self) -> bool:
        """Whether the router has it."""
        return self.state in AT_ROUTER

    def to(self, state: State, **changes: Any) -> Worker:
        """The worker in its next state, with other fields changed along.

        Raises:
            ValueError: the transition is not a legal one, or the fields do not fit the state.
        """
        if state not in NEXT[self.state]:
            legal = ", ".join(sorted(NEXT[self.state])) or "nothing: it is the end"
            raise ValueError(f"{self.url} is {self.state} and cannot become {state}; what may follow is {legal}")
        return replace(self, state=state, **changes)

    def restarted(self, instance: Mapping[str, str]) -> bool:
        """Whether an engine that says this about its start is in another life than the one that was known."""
        return any(self.instance[name] != instance[name] for name in self.instance.keys() & instance.keys())

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "url": self.url,
            "role": self.role,
            "bootstrap_port": self.bootstrap_port,
            "state": str(self.state),
            "incarnation": self.incarnation,
            "weight_version": self.seen,
            "wanted": self.wanted,
            "failures": self.failures,
            "reason": self.reason,
        }


def worker_url(text: str) -> str:
    """A base URL in the one spelling that is compared: lower-case host, no trailing slash.

    Raises:
        ValueError: not http(s)://host[:port], or with a path, query, fragment or user.
    """
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError as error:
        raise ValueError(f"expected a URL http://HOST:PORT, got {text!r}: {error}") from error
    plain = not (parts.path.rstrip("/") or parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain or any(map(str.isspace, parts.netloc)):
        raise ValueError(f"expected a URL http://HOST:PORT without a path, got {text!r}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")
