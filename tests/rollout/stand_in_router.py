"""A router that can be down, slow, busy, forgetful or talk nonsense, over real HTTP; it speaks the dialect `workers`.

For what a published gateway cannot be brought to do on demand; everything else is tested against those.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class StandInRouter:
    """Starts at once, on a free port.

    Attributes:
        workers: what it lists, by URL.
        busy: how many calls it answers with 503 before it works again.
        after_add: called with the URL once it has listed a worker.
        nonsense: answers every call with this body and status 200, if not None.
        sticky: says that it removes workers, and does not.
        drops: answers with one byte every 50 ms, for ever.
        seen: every call, "METHOD /path".
        auth: authorization headers that came.
    """

    def __init__(self) -> None:
        self.workers: dict[str, dict[str, Any]] = {}
        self.busy = 0
        self.nonsense: bytes | None = None
        self.drops = self.sticky = False
        self.after_add: Callable[[str], None] = lambda url: None
        self.seen: list[str] = []
        self.auth: set[str | None] = set()
        self._port = 0
        self.start()

    def start(self) -> None:
        """Listen, on the same port as before."""
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                router.answer(self)

            do_POST = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> StandInRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        raw = http.rfile.read(int(http.headers.get("content-length") or 0))
        self.seen.append(f"{http.command} {http.path}")
        self.auth.add(http.headers.get("authorization"))
        if self.drops:
            self._drip(http)
            return
        status, body = self._work(http.command, unquote(http.path), json.loads(raw) if raw else {})
        if self.busy:
            self.busy -= 1
            status, body = 503, {"error": "busy"}
        sent = json.dumps(body).encode() if self.nonsense is None else self.nonsense
        http.send_response(200 if self.nonsense is not None else status)
        http.send_header("content-length", str(len(sent)))
        http.end_headers()
        http.wfile.write(sent)

    def _work(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if (method, path) == ("GET", "/workers"):
            return 200, {"workers": list(self.workers.values())}
        if (method, path) == ("POST", "/workers"):
            url = body["url"]
            self.workers[url] = {**body, "id": url, "is_healthy": True}
            self.after_add(url)
            return 202, {"worker_id": url}
        if method == "DELETE" and path.startswith("/workers/"):
            url = path.removeprefix("/workers/")
            gone = self.workers.get(url) if self.sticky else self.workers.pop(url, None)
            return (404, {"error": "not found"}) if gone is None else (202, {})
        return 404, {"error": "no such path"}

    def _drip(self, http: BaseHTTPRequestHandler) -> None:
        http.send_response(200)
        http.end_headers()
        try:
            while self.drops:
                http.wfile.write(b" ")
                http.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass
