"""Paths that are passed on to the engine, and those that are not; what clients ask about the model."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from pacenote.rollout.errors import BadRequest, Forbidden
from pacenote.rollout.launch import free_port
from pacenote.rollout.proxy import check_path

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

WAIT = 30


@dataclass
class Upstream:
    """An engine that answers any path, and notes what came."""

    answer: Callable[[], Response] | None = None
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    left: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    async def handle(self, request: Request) -> Response:
        """Any request."""
        body = await request.body()
        path = request.scope["raw_path"].decode() + (f"?{request.url.query}" if request.url.query else "")
        self.seen.append((request.method, path, dict(request.headers), body))
        self.arrived.release()
        if request.url.path.endswith("/slow"):
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.left.release()
        return self.answer() if self.answer else Response(b"from the engine", media_type="text/plain")

    def app(self) -> Starlette:
        """The ASGI application."""
        every = ["GET", "POST", "PUT", "DELETE", "PATCH"]
        return Starlette(routes=[Route("/{path:path}", self.handle, methods=every)])


@pytest.fixture(scope="module")
def behind() -> Upstream:
    """The engine."""
    return Upstream()


@pytest.fixture(scope="module")
def served(serve: Callable[..., Served], served_app: type[Served], behind: Upstream) -> Iterator[Served]:
    """A session server in front of it; the engine's base URL has a path of its own."""
    with served_app(behind.app()) as engine, serve(upstream=f"{engine.url}/base/", served_model="tiny") as served:
        yield served


@pytest.fixture
def http(served: Served, behind: Upstream) -> Iterator[httpx.Client]:
    """A client; the engine is as new."""
    behind.answer = None
    behind.seen.clear()
    with httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as client:
        yield client


def raw(served: Served, head: str, body: bytes = b"") -> bytes:
    """Send a request as it is, and read to the end."""
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port or 80)) as client:
        client.settimeout(WAIT)
        client.sendall(head.replace("\n", "\r\n").encode() + b"\r\nconnection: close\r\n\r\n" + body)
        parts = []
        while data := client.recv(65536):
            parts.append(data)
    return b"".join(parts)


def test_the_rest_is_passed_on(http: httpx.Client, behind: Upstream) -> None:
    answer = http.get("/sessions/s/v1/loads?a=1&b=%2e%2e")
    assert (answer.status_code, answer.text) == (200, "from the engine")
    answer = http.post("/sessions/s/v1/tokenize", json={"prompt": "x"})
    assert answer.status_code == 200
    (get, path, _, _), (post, other, headers, body) = behind.seen
    assert (get, path) == ("GET", "/base/v1/loads?a=1&b=%2e%2e")
    assert (post, other, body) == ("POST", "/base/v1/tokenize", b'{"prompt":"x"}')
    assert headers["content-type"] == "application/json"
    assert http.head("/sessions/s/metrics").status_code == 200
    assert http.get("/sessions/s").json()["records"] == []  # nothing was created
    assert "created" not in http.get("/sessions/s").json()["metadata"]


def test_headers_that_stay_on_either_side(http: httpx.Client, behind: Upstream) -> None:
    behind.answer = lambda: Response(
        b"x" * 10,
        201,
        {
            "x-mine": "1",
            "connection": "x-hop, close",
            "x-hop": "2",
            "keep-alive": "timeout=5",
            "set-cookie": "a=b",
            "location": "http://inside:1/x",
            "server": "inside",
            "date": "then",
        },
    )
    sent = {
        "authorization": "Bearer secret",
        "x-api-key": "secret",
        "cookie": "secret",
        "x-smg-routing-key": "w",
        "x-smg-target-worker": "0",
        "forwarded": "for=x",
        "host": "elsewhere",
        "te": "trailers",
        "connection": "x-hop",
        "x-hop": "1",
        "x-request-id": "r1",
        "accept": "text/plain",
    }
    answer = http.get("/sessions/s/metrics", headers=sent)
    assert (answer.status_code, answer.content, answer.headers["x-mine"]) == (201, b"x" * 10, "1")
    assert not {"x-hop", "keep-alive", "set-cookie", "location"} & set(answer.headers)
    assert len(answer.headers.get_list("date")) == len(answer.headers.get_list("server")) == 1
    assert answer.headers["server"] != "inside"
    [(_, _, headers, _)] = behind.seen
    assert "secret" not in str(headers)
    assert not {"x-smg-routing-key", "x-smg-target-worker", "forwarded", "te", "x-hop"} & set(headers)
    assert (headers["x-request-id"], headers["accept"]) == ("r1", "text/plain")
    assert headers["host"] != "elsewhere"


def test_an_answer_that_comes_in_parts(http: httpx.Client, behind: Upstream) -> None:
    more = threading.Event()

    async def parts() -> Any:
        yield b"first"
        await asyncio.to_thread(more.wait, WAIT)
        yield b"second"

    behind.answer = lambda: StreamingResponse(parts())
    with http.stream("GET", "/sessions/s/metrics") as answer:
        parts_ = answer.iter_raw()
        assert next(parts_) == b"first"  # while the engine still holds the second
        more.set()
        assert b"".join(parts_) == b"second"


GENERATES = [
    "generate", "v1/completions", "V1/Completions", "v1/chat/completions/", "v1/chat/completions/x", "invocations",
    "v1/responses/x", "v1/messages/batches", "api/chat", "api/generate", "vertex_generate", "health_generate",
    "v1/batches", "base/generate", "inference/v1/generate", "v1/audio/transcriptions", "v1/chat", "generate/",
]  # fmt: skip
CHANGES = [
    "flush_cache", "update_weights_from_disk", "update_weight_version", "abort_request", "pause_generation",
    "continue_generation", "release_memory_occupation", "load_lora_adapter", "start_profile", "workers", "add_worker",
    "open_session", "configure_logging", "v1/responses/x/cancel", "get_weights_by_name", "slow_down", "FLUSH_CACHE",
    "set_internal_state", "collective_rpc", "sleep", "v1/tokenizers", "dump_expert_distribution_record",
    "set_trace_level", "pd_role_switch", "add_external_corpus", "remove_external_corpus", "list_external_corpora",
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [(path, 400, "bad_request") for path in GENERATES] + [(path, 403, "permission_denied") for path in CHANGES],
)
def test_what_generates_or_changes_is_refused(
    http: httpx.Client, behind: Upstream, path: str, status: int, code: str
) -> None:
    for method in ("GET", "POST"):
        answer = http.request(method, f"/sessions/s/{path}", follow_redirects=False)
        if answer.status_code in (307, 405):  # a path of our own, but for its method or a slash
            continue
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == code
        says = "generates tokens that this server could not record" if status == 400 else "changes the engine"
        assert says in answer.json()["error"]["message"]
    assert behind.seen == []


def test_no_other_place_than_the_engine(served: Served, http: httpx.Client, behind: Upstream) -> None:
    paths = [
        "../../admin", "%2e%2e/%2e%2e/admin", "..%2f..%2fadmin", "/evil.example/x", "v1//models2",
        "x%0d%0aHost:%20evil", "a%5cb", "a%00b", "%252e%252e/admin", "a%3fb", "%20", "a%23b", "a//",
    ]  # fmt: skip
    for path in paths:
        answer = raw(served, f"GET /sessions/s/{path} HTTP/1.1\nhost: x")
        assert answer.split(b" ")[1] in (b"400", b"404"), (path, answer)
    assert behind.seen == []
    raw(served, "GET http://evil.example/sessions/s/metrics HTTP/1.1\nhost: evil.example")
    raw(served, "GET /sessions/s/http://evil.example/x HTTP/1.1\nhost: x")
    raw(served, "GET /sessions/s/@evil.example HTTP/1.1\nhost: x")
    assert [path for _, path, _, _ in behind.seen] == ["/base/metrics", "/base/@evil.example"]


@given(st.text(alphabet="./\\%?#@:; \r\n\0aA~é", max_size=12))
@example("a/./b")
@example("./a")
def test_a_path_that_passes_is_plain(text: str) -> None:
    try:
        path = check_path(text)
    except (BadRequest, Forbidden):
        return
    url = httpx.URL("http://engine:1/base").copy_with(raw_path=f"/base/{path}".encode())
    assert (url.host, url.port, url.path, url.query) == ("engine", 1, f"/base/{path}", b"")
    assert not {"", ".", ".."} & set(path.split("/"))


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_methods_that_are_not_passed_on(http: httpx.Client, behind: Upstream, method: str) -> None:
    answer = http.request(method, "/sessions/s/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert behind.seen == []


def test_an_engine_that_fails(http: httpx.Client, behind: Upstream, serve: Callable[..., Served]) -> None:
    for status, code in ((500, "upstream_error"), (503, "upstream_error"), (302, "upstream_error")):
        behind.answer = lambda status=status: Response(b"boom", status, {"location": "http://inside:1/"})
        answer = http.get("/sessions/s/metrics", follow_redirects=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, code)
    behind.answer = lambda: Response(b"not mine", 404)
    assert (http.get("/sessions/s/metrics").status_code, http.get("/sessions/s/metrics").text) == (404, "not mine")
    with serve(upstream=f"http://127.0.0.1:{free_port()}") as served:
        answer = httpx.get(f"{served.url}/sessions/s/metrics", trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_error")


def test_a_client_that_leaves(served: Served, behind: Upstream) -> None:
    url = httpx.URL(served.url)
    while behind.arrived.acquire(blocking=False):
        pass
    with socket.create_connection((url.host, url.port or 80)) as client:
        client.sendall(b"GET /sessions/s/slow HTTP/1.1\r\nhost: x\r\n\r\n")
        assert behind.arrived.acquire(timeout=WAIT)
    assert behind.left.acquire(timeout=WAIT)


def test_a_session_that_is_gone(http: httpx.Client, behind: Upstream) -> None:
    http.delete("/sessions/gone")
    for path in ("metrics", "v1/models", "model_info"):
        answer = http.get(f"/sessions/gone/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "session_deleted")
    assert behind.seen == []


def test_what_clients_ask_about_the_model(http: httpx.Client, behind: Upstream) -> None:
    assert [card["id"] for card in http.get("/sessions/s/v1/models").json()["data"]] == ["tiny"]
    assert http.get("/sessions/s/v1/models/any/name").json()["id"] == "any/name"
    for path in ("model_info", "get_model_info", "server_info", "get_server_info"):
        info = http.get(f"/sessions/s/{path}").json()
        assert (info["model_path"], info["is_generation"], info["weight_version"]) == ("tiny", True, None)
    for path in ("v1/model/info", "v1/v1/model/info", "model/info"):
        [entry] = http.get(f"/sessions/s/{path}").json()["data"]
        assert entry["model_name"] == "tiny"
    assert behind.seen == []


def test_the_weights_of_the_newest_turn(serve: Callable[..., Served], engine: ScriptedEngine, answer: Any) -> None:
    engine.write = lambda body: answer(body, [40], version="7")
    with serve() as served, httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http:
        http.post("/sessions/s/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert http.get("/sessions/s/model_info").json()["weight_version"] == "7"
