"""An engine that generates nothing but answers what gateways and pools ask, over real HTTP, and can die and return."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_lives = itertools.count(1)


class StandIn:
    """Starts at once, on a free port.

    Attributes:
        version: weight version that it serves.
        sick: answer every health check with 503.
        slow: seconds before any answer.
        asked: how often each path was asked for.
        on: called with the path before an answer.
    """

    def __init__(self, role: str = "regular", *, version: str = "1", bootstrap_port: int | None = None) -> None:
        self.role, self.version, self.bootstrap_port = role, version, bootstrap_port
        self.sick, self.slow, self.running = False, 0.0, 0
        self.asked: Counter[str] = Counter()
        self.on: Callable[[str], None] = lambda path: None
        self._port = 0
        self.start()

    def start(self) -> None:
        """A new life, on the same port."""
        self.life = next(_lives)
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                engine.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Dies."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        path = http.path.split("?")[0]
        self.asked[path] += 1
        self.on(path)
        time.sleep(self.slow)
        body = self._body(path)
        status = 404 if body is None else 503 if self.sick and path.startswith("/health") else 200
        raw = json.dumps(body).encode()
        http.send_response(status)
        http.send_header("content-type", "application/json")
        http.send_header("content-length", str(len(raw)))
        http.end_headers()
        http.wfile.write(raw)

    def _body(self, path: str) -> dict[str, Any] | None:
        model = {"model_path": "tiny", "tokenizer_path": "tiny", "served_model_name": "tiny"}
        sizes = {"tp_size": 1, "dp_size": 1, "pp_size": 1, "max_total_num_tokens": 1000, "context_length": 1000}
        mode = {"disaggregation_mode": "null" if self.role == "regular" else self.role}
        mode |= {} if self.bootstrap_port is None else {"disaggregation_bootstrap_port": self.bootstrap_port}  # type: ignore[dict-item]
        load = {"dp_rank": 0, "num_running_reqs": self.running, "num_waiting_reqs": 0, "num_total_tokens": 0}
        load |= {"num_used_tokens": 0, "token_usage": 0}
        bodies: dict[str, dict[str, Any]] = {
            "/health": {},
            "/health_generate": {},
            "/server_info": model | sizes | mode | {"version": "0.5.23", "startup_time": {"e2e": self.life}},
            "/model_info": model | {"is_generation": True, "weight_version": self.version, "model_type": "glm"},
            "/v1/models": {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 1000}]},
            "/v1/loads": {"timestamp": "now", "version": "0.5.23", "dp_rank_count": 1, "loads": [load]},
        }
        return bodies.get(path.replace("/get_", "/"))
