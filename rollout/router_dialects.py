"""The two ways in which routers are told about workers: what to send, and how to read the listing. No I/O.

`add_worker` (sglang-router up to 0.2.1, miles-style routers): everything in the query, and a listing of bare URLs.
`workers` (sglang-router from 0.2.1, smg): JSON, and a listing with roles and health. sglang-router 0.2.1 speaks both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from pacenote.rollout.worker import ROLES, Worker, worker_url

_RANK = re.compile(r"@\d+$")  # a data-parallel rank, which gateways append to the URL of a worker with several


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request to a router.

    Attributes:
        method: GET, POST or DELETE.
        path: with the query, percent-encoded.
        body: JSON, or None.
    """

    method: str
    path: str
    body: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A worker in a router's listing.

    Attributes:
        url: base URL, spelled as a `Worker`'s.
        id: what the router calls it.
        role: None where the listing does not say.
        healthy: None where the listing does not say.
        bootstrap_port: None where the listing does not say.
        draining: it was removed, gets nothing new, and is listed until its last requests have ended (smg).
    """

    url: str
    id: str
    role: str | None = None
    healthy: bool | None = None
    bootstrap_port: int | None = None
    draining: bool = False


class Dialect(Protocol):
    """What to send for each call, and how to read the listing."""

    name: str
    lists: Call

    def add(self, worker: Worker, extra: Mapping[str, Any]) -> Call:
        """The call that adds a worker."""

    def remove(self, listed: Listed) -> Call:
        """The call that removes one."""

    def read(self, body: Any) -> tuple[Listed, ...]:
        """The listing.

        Raises:
            ValueError: the body is not this dialect's.
        """


class AddWorker:
    """`POST /add_worker?url=...`, `GET /list_workers`, `POST /remove_worker?url=...`."""

    name = "add_worker"
    lists = Call(method="GET", path="/list_workers")

    def add(self, worker: Worker, extra: Mapping[str, Any]) -> Call:
        """The role goes along for prefill and decode; routers that do not know it register the worker as regular."""
        query: dict[str, Any] = {"url": worker.url}
        if worker.role != "regular":
            query["worker_type"] = worker.role
        if worker.bootstrap_port is not None:
            query["bootstrap_port"] = worker.bootstrap_port
        return Call(method="POST", path=f"/add_worker?{_query({**query, **extra})}")

    def remove(self, listed: Listed) -> Call:
        """By URL, as it was added."""
        return Call(method="POST", path=f"/remove_worker?{_query({'url': _RANK.sub('', listed.id)})}")

    def read(self, body: Any) -> tuple[Listed, ...]:
        """`{"urls": [...]}`."""
        urls = body.get("urls") if isinstance(body, dict) else None
        if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
            raise ValueError('expected {"urls": [...]}')
        return tuple(Listed(url=_listed_url(url), id=url) for url in urls)


class Workers:
    """`POST /workers` with JSON, `GET /workers`, `DELETE /workers/{id}`; the id is a UUID or the quoted URL."""

    name = "workers"
    lists = Call(method="GET", path="/workers")

    def add(self, worker: Worker, extra: Mapping[str, Any]) -> Call:
        """Role and port are fields of the body."""
        body: dict[str, Any] = {"url": worker.url, "worker_type": worker.role}
        if worker.bootstrap_port is not None:
            body["bootstrap_port"] = worker.bootstrap_port
        return Call(method="POST", path="/workers", body={**body, **extra})

    def remove(self, listed: Listed) -> Call:
        """By id."""
        return Call(method="DELETE", path=f"/workers/{quote(listed.id, safe='')}")

    def read(self, body: Any) -> tuple[Listed, ...]:
        """`{"workers": [{"id", "url", "worker_type", "is_healthy", "bootstrap_port"?, ...}]}`."""
        workers = body.get("workers") if isinstance(body, dict) else None
        if not isinstance(workers, list):
            raise ValueError('expected {"workers": [...]}')
        return tuple(_entry(worker) for worker in workers)


DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (Workers(), AddWorker())}
"""By name, in the order in which they are tried: the one whose listing says most comes first."""


def _entry(body: Any) -> Listed:
    url = body.get("url") if isinstance(body, dict) else None
    if not isinstance(url, str):
        raise ValueError(f'expected every entry of "workers" with a "url", got {str(body)[:200]}')
    role, port, healthy = body.get("worker_type"), body.get("bootstrap_port"), body.get("is_healthy")
    return Listed(
        url=_listed_url(url),
        id=str(body.get("id") or url),
        role=role if role in ROLES else None,
        healthy=healthy if isinstance(healthy, bool) else None,
        bootstrap_port=port if isinstance(port, int) else None,
        draining=body.get("status") == "draining",
    )


def _listed_url(text: str) -> str:
    """A router may list what is not ours, a gRPC worker for example: that keeps its spelling."""
    plain = _RANK.sub("", text)
    try:
        return worker_url(plain)
    except ValueError:
        return plain


def _query(fields: Mapping[str, Any]) -> str:
    return urlencode(fields, quote_via=quote, safe="")
