"""Telling a router about workers, and reading back what it made of it.

An answer of 200 or 202 proves nothing: some routers work in the background, and one registers prefill workers as
regular ones and says that all is well. So every change is confirmed by the listing, and a worker that stands there as
something else is taken off again and reported.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from pacenote.rollout.router_call import Answer, call
from pacenote.rollout.router_dialects import DIALECTS, Call, Dialect, Listed
from pacenote.rollout.worker import Worker, worker_url
from pacenote.rollout.worker_errors import (
    NotConfirmed,
    RoleMismatch,
    RouterError,
    RouterRefused,
    UnknownDialect,
    WorkerError,
)

AUTO = "auto"
_SHORTEST, _LONGEST = 0.05, 1.0  # seconds between two looks at the listing
_BUSY = frozenset({429, 500, 502, 503, 504})
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How to talk to a router.

    Attributes:
        url: base URL.
        dialect: "auto" (ask the router), "workers" or "add_worker".
        api_key: sent as a bearer token; None sends none.
        timeout: seconds for one call.
        retries: how often a call is tried again that found nobody, or a busy router.
        backoff: seconds before the first of these; doubles.
        confirm: seconds until the listing has to show a change.
        accept_unlisted_role: take a prefill or decode worker as registered though the listing has no roles. Only for a
            router that is known to heed `worker_type`.
        extra: more fields of every registration, for example {"priority": 50}.

    Raises:
        ValueError: a URL, a dialect or a number that cannot be.
    """

    url: str
    dialect: str = AUTO
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 5.0
    retries: int = 3
    backoff: float = 0.2
    confirm: float = 30.0
    accept_unlisted_role: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", worker_url(self.url))
        if self.dialect not in (AUTO, *DIALECTS):
            raise ValueError(f"expected a dialect of {AUTO}, {', '.join(DIALECTS)}, got {self.dialect!r}")
        if self.timeout <= 0 or self.confirm <= 0 or self.retries < 0 or self.backoff < 0:
            raise ValueError(
                "expected timeout > 0, confirm > 0, retries >= 0 and backoff >= 0, got "
                f"{self.timeout}, {self.confirm}, {self.retries} and {self.backoff}"
            )


class Router:
    """One router. Threads may share it.

    Args:
        config: see `RouterConfig`; a string is its `url`.

    Raises:
        ValueError: see `RouterConfig`.
    """

    def __init__(self, config: RouterConfig | str) -> None:
        self.config = RouterConfig(url=config) if isinstance(config, str) else config
        headers = {} if self.config.api_key is None else {"authorization": f"Bearer {self.config.api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.config.url, headers=headers, trust_env=False, limits=limits)
        self._dialect = DIALECTS.get(self.config.dialect)
        self._jobs: dict[str, str] = {}  # URL -> the router's id of a registration that it works on

    @property
    def url(self) -> str:
        """Base URL."""
        return self.config.url

    @property
    def dialect(self) -> Dialect:
        """The configured dialect, or the first one whose listing the router answers; asked once.

        Raises:
            UnknownDialect: it speaks neither.
            RouterError: it does not answer.
        """
        if self._dialect is None:
            self._dialect = self._ask_dialect()
        return self._dialect

    def listing(self) -> tuple[Listed, ...]:
        """The router's workers.

        Raises:
            RouterError: no answer, or one that is not a listing.
        """
        dialect = self.dialect
        answer = self._call(dialect.lists)
        found = _read(dialect, answer)
        if found is None:
            raise RouterError(
                f"expected a listing of the dialect {dialect.name} from {dialect.lists.method} {self.url}"
                f"{dialect.lists.path}, got {answer.short}: is this the router, and does it speak this dialect?"
            )
        return found

    def add(self, worker: Worker) -> None:
        """Register a worker; returns once the router has accepted the call, which proves nothing: see `confirm`.

        A worker that is listed already, in its role, is left as it is. One that is still draining is waited for.

        Raises:
            RoleMismatch: it is listed in another role.
            NotConfirmed: it was removed before and is still draining.
            RouterRefused: the router said no.
            RouterError: no answer.
        """
        self._wait_until(
            lambda: not any(listed.draining for listed in self._listed(worker.url)),
            f"the router {self.url} is still draining {worker.url}, which was removed before",
        )
        if self._is_listed(worker):
            return
        dialect = self.dialect
        if dialect.name == "add_worker" and worker.role != "regular":
            _log.warning(
                "%s is sent to %s as a %s worker by /add_worker: a router that ignores worker_type registers it as a "
                "regular one; the listing is read back",
                worker.url, self.url, worker.role,
            )  # fmt: skip
        asked = dialect.add(worker, self.config.extra)
        answer = self._retry(lambda: self._busy(asked), done=lambda: self._is_listed(worker))
        if answer is None or answer.ok:
            self._note(worker, answer)
        elif not ("already exists" in answer.text and self._is_listed(worker)):
            hint = "; the router does not know this call: try --dialect auto" if answer.status in (404, 405) else ""
            raise RouterRefused(
                f"the router {self.url} refused {worker.role} worker {worker.url}: {asked.method} {asked.path} "
                f"answered {answer.short}{hint}",
                answer.status,
            )

    def confirm(self, worker: Worker) -> Listed:
        """Wait until the listing shows the worker, healthy and in its role.

        Raises:
            RoleMismatch: it is listed in another role, or its role cannot be told; it has been removed again.
            NotConfirmed: not in time.
            RouterError: no answer.
        """
        deadline, pause = time.monotonic() + self.config.confirm, _SHORTEST
        while True:
            mine = [listed for listed in self._listed(worker.url) if not listed.draining]
            try:
                for listed in mine:
                    self._check_role(worker, listed)
            except RoleMismatch as error:
                raise self._undone(worker, error) from None
            if mine and all(listed.healthy is not False for listed in mine):
                self._jobs.pop(worker.url, None)
                return mine[0]
            failed = None if mine else self._failed_job(worker)
            if failed or time.monotonic() > deadline:
                said = failed or ("it calls it unhealthy" if mine else "it is not there")
                raise NotConfirmed(
                    f"the router {self.url} accepted {worker.url}, but its listing did not show it healthy "
                    f"{'' if failed else f'within {self.config.confirm:g} s '}({said})"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def remove(self, *urls: str, timeout: float | None = None) -> tuple[str, ...]:
        """Remove workers, by URL whatever the router calls them, and wait until none gets requests any more: until it
        is not listed, or listed as draining.

        Args:
            timeout: seconds for all of it; `confirm` of the configuration if None.

        Returns:
            those that were there.

        Raises:
            NotConfirmed: some are still listed.
            RouterError: no answer, or a refusal.
        """
        wanted = {worker_url(url) for url in urls}
        jobs = {url: self._jobs.pop(url) for url in wanted & self._jobs.keys()}
        there = self._listed(*wanted)
        pending = [Listed(url=url, id=job) for url, job in jobs.items() if url not in {listed.url for listed in there}]
        for listed in [*(entry for entry in there if not entry.draining), *pending]:
            self._remove(listed)
        if there:
            self._wait_until(
                lambda: all(listed.draining for listed in self._listed(*wanted)),
                f"the router {self.url} still lists {', '.join(sorted(wanted))} after removing them",
                timeout=timeout,
            )
        return tuple(sorted({listed.url for listed in there}))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask_dialect(self) -> Dialect:
        seen = []
        for dialect in DIALECTS.values():
            answer = self._call(dialect.lists)
            if _read(dialect, answer) is not None:
                return dialect
            seen.append(f"{dialect.lists.method} {dialect.lists.path} answered {answer.short}")
        raise UnknownDialect(
            f"expected {self.url} to be a router with the dialect {' or '.join(DIALECTS)}, but "
            f"{' and '.join(seen)}: check the URL and the API key, or name the dialect (--dialect)"
        )

    def _is_listed(self, worker: Worker) -> bool:
        """Whether it is there, in its role.

        Raises:
            RoleMismatch: there, but otherwise.
        """
        mine = self._listed(worker.url)
        for listed in mine:
            self._check_role(worker, listed)
        return bool(mine)

    def _listed(self, *urls: str) -> list[Listed]:
        return [listed for listed in self.listing() if listed.url in urls]

    def _wait_until(self, done: Callable[[], bool], otherwise: str, *, timeout: float | None = None) -> None:
        deadline, pause = time.monotonic() + (self.config.confirm if timeout is None else timeout), _SHORTEST
        while not done():
            if time.monotonic() > deadline:
                raise NotConfirmed(otherwise)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def _check_role(self, worker: Worker, listed: Listed) -> None:
        if listed.role is None and worker.role != "regular" and not self.config.accept_unlisted_role:
            raise RoleMismatch(
                f"the router {self.url} lists {worker.url} without a role, so it cannot be told whether it took it as "
                f"a {worker.role} worker or as a regular one: use a router with GET /workers, or accept_unlisted_role "
                "(--accept-unlisted-role) for one that is known to heed worker_type"
            )
        if listed.role is not None and listed.role != worker.role:
            raise RoleMismatch(
                f"{worker.url} is a {worker.role} worker, but the router {self.url} lists it as {listed.role}: "
                f"{self._other_way(worker)}"
            )
        if (
            None not in (listed.bootstrap_port, worker.bootstrap_port)
            and listed.bootstrap_port != worker.bootstrap_port
        ):
            raise RoleMismatch(
                f"{worker.url} has bootstrap port {worker.bootstrap_port}, but the router {self.url} lists it with "
                f"{listed.bootstrap_port}: remove it there first"
            )

    def _other_way(self, worker: Worker) -> str:
        if self.dialect.name == "add_worker":
            return "it ignored worker_type; use --dialect workers, or a router that heeds it"
        return f"remove it there first if it was added as that (pacenote workers remove {worker.url})"

    def _undone(self, worker: Worker, error: RoleMismatch) -> RoleMismatch:
        try:
            self.remove(worker.url)
        except WorkerError as failed:
            return RoleMismatch(f"{error}; AND IT IS STILL THERE: {failed}")
        return RoleMismatch(f"{error}; it was removed again")

    def _note(self, worker: Worker, answer: Answer | None) -> None:
        """Remember what the router calls a registration that it has yet to carry out."""
        body = answer.json() if answer is not None and answer.status == 202 else None
        if isinstance(body, dict) and isinstance(body.get("worker_id"), str):
            self._jobs[worker.url] = body["worker_id"]

    def _failed_job(self, worker: Worker) -> str | None:
        """Why the router gave up on a registration; None while it has not, or if it does not say."""
        if worker.url not in self._jobs:
            return None
        job = self.dialect.remove(Listed(url=worker.url, id=self._jobs[worker.url])).path
        try:
            body = self._call(Call(method="GET", path=job)).json()
        except RouterError:
            return None
        status = body.get("job_status") if isinstance(body, dict) else None
        failed = isinstance(status, dict) and status.get("status") == "failed"
        return f"it gave up: {status.get('message')}" if failed and isinstance(status, dict) else None

    def _remove(self, listed: Listed) -> None:
        asked = self.dialect.remove(listed)
        answer = self._call(asked)
        gone = answer.status == 404 or "not found" in answer.text
        if not answer.ok and not (gone and not self._listed(listed.url)):
            raise RouterRefused(
                f"the router {self.url} did not remove {listed.url}: {asked.method} {asked.path} answered "
                f"{answer.short}",
                answer.status,
            )

    def _call(self, asked: Call) -> Answer:
        """Send a call that may be sent twice."""
        answer = self._retry(lambda: self._busy(asked))
        assert answer is not None, "only `done` ends without an answer"
        return answer

    def _busy(self, asked: Call) -> tuple[Answer, bool]:
        answer = call(self._client, asked, timeout=self.config.timeout)
        return answer, answer.status in _BUSY

    def _retry(
        self, attempt: Callable[[], tuple[Answer, bool]], *, done: Callable[[], bool] = lambda: False
    ) -> Answer | None:
        """The first answer that is not "busy", or the last. None if an attempt that failed was `done` all the same."""
        pause = self.config.backoff
        for left in range(self.config.retries, -1, -1):
            try:
                answer, busy = attempt()
            except RouterError:
                if not left:
                    raise
            else:
                if not busy or not left:
                    return answer
            time.sleep(pause)
            pause *= 2
            if done():
                return None
        raise AssertionError("the last attempt returns or raises")


def _read(dialect: Dialect, answer: Answer) -> tuple[Listed, ...] | None:
    if not answer.ok:
        return None
    try:
        return dialect.read(answer.json())
    except ValueError:
        return None
