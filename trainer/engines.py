"""One engine as the trainer sees it: SGLang's control calls, and what went wrong with the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import httpx

Result = TypeVar("Result")
Pause = Literal["none", "abort", "retract", "in_place"]


class Engine:
    """An engine that is given weights. After an error it is asked nothing more.

    Args:
        url: base URL.
        timeout: seconds that one call may take.

    Attributes:
        error: what went wrong; None while nothing has.
        lost: it did not answer.
        version: what it said it serves when it was last asked.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(timeout=timeout, trust_env=False)
        self.error: str | None = None
        self.lost = False
        self.version: str | None = None

    def post(self, path: str, body: dict[str, Any]) -> None:
        """Call, unless something went wrong before; an error is kept, not raised."""
        if self.error is not None:
            return
        try:
            answer = self._client.post(f"{self.url}/{path}", json=body)
            said = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        except (httpx.HTTPError, ValueError) as error:
            self.error, self.lost = f"{path}: {type(error).__name__}: {error}", True
            return
        if answer.is_error or said.get("success") is False:
            self.error = f"{path}: {answer.status_code} {said.get('message') or answer.text[:300]}"

    def verify(self, version: str) -> None:
        """Ask what it serves; another version than this one is an error."""
        try:
            self.version = str(self._client.get(f"{self.url}/model_info").json().get("weight_version"))
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            self.version = None
            self.error, self.lost = self.error or f"model_info: {type(error).__name__}: {error}", True
        else:
            if self.version != version and self.error is None:
                self.error = "it took them, and says that it serves others"

    def ranks(self) -> int:
        """Ranks of its tensor parallelism, each of which is in a process group; 1 where it does not say."""
        try:
            return int(self._client.get(f"{self.url}/server_info").json().get("tp_size") or 1)
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            self.error, self.lost = f"server_info: {type(error).__name__}: {error}", True
            return 1

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def each(engines: Iterable[Engine], call: Callable[[Engine], Result]) -> list[Result]:
    """The same call to all of them at once."""
    chosen = list(engines)
    with ThreadPoolExecutor(max(1, len(chosen))) as threads:
        return list(threads.map(call, chosen))
