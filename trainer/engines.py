"""One engine as the trainer sees it: SGLang's control calls, and what went wrong with the first that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import httpx

Result = TypeVar("Result")
Pause = Literal["none", "abort", "retract", "in_place"]


class Engine:
    """An engine that is given weights. After an error nothing more is asked of it, but `try_post` and `verify`.

    Args:
        url: base URL.
        timeout: seconds that one call may take.

    Attributes:
        error: what went wrong first; None while nothing has.
        lost: it did not answer.
        version: what it said it serves when it was last asked.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(timeout=timeout, trust_env=False)
        self.error: str | None = None
        self.lost = False
        self.version: str | None = None

    def post(self, path: str, body: dict[str, Any]) -> bool:
        """Call, unless something went wrong before; an error is kept, not raised. Returns whether all is well."""
        if self.error is not None:
            return False
        try:
            answer = self._client.post(f"{self.url}/{path}", json=body)
            said = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        except (httpx.HTTPError, ValueError) as error:
            self.fail(f"{path}: {type(error).__name__}: {error}", lost=True)
            return False
        if answer.is_error or said.get("success") is False:
            self.fail(f"{path}: {answer.status_code} {said.get('message') or answer.text[:300]}")
        return self.error is None

    def try_post(self, path: str, body: dict[str, Any]) -> None:
        """Call an engine that failed but answers, to leave it in order; what comes of it changes nothing."""
        if not self.lost:
            try:
                self._client.post(f"{self.url}/{path}", json=body)
            except httpx.HTTPError:
                self.lost = True

    def fail(self, error: str, *, lost: bool = False) -> None:
        """Something went wrong; the first thing is what is told."""
        self.error, self.lost = self.error or error, self.lost or lost

    def verify(self, version: str) -> None:
        """Ask what it serves; another version than this one is an error."""
        self.version = None
        try:
            self.version = str(self._client.get(f"{self.url}/model_info").json()["weight_version"])
        except (httpx.HTTPError, ValueError, TypeError, KeyError) as error:
            self.fail(f"model_info: {type(error).__name__}: {error}", lost=True)
        else:
            if self.version != version:
                self.fail("it took them, and says that it serves others")

    def ranks(self) -> int:
        """Ranks of its tensor parallelism; 1 where it does not say."""
        if self.error is None:
            try:
                return int(self._client.get(f"{self.url}/server_info").json().get("tp_size") or 1)
            except (httpx.HTTPError, ValueError, AttributeError) as error:
                self.fail(f"server_info: {type(error).__name__}: {error}", lost=True)
        return 1

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def each(engines: Iterable[Engine], call: Callable[[Engine], Result]) -> list[Result]:
    """The same call to all of them at once."""
    chosen = list(engines)
    with ThreadPoolExecutor(max(1, len(chosen))) as threads:
        return list(threads.map(call, chosen))
