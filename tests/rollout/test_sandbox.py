"""An agent with nothing but its session's key tries to get out: into other sessions, the admin's paths, other hosts.

On one process and behind the gate of two, byte by byte: what clients would tidy up arrives as it was written.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pacenote.rollout.launch import Service, free_port, sessions_command
from pacenote.rollout.sglang import CLIENT_FIELDS
from tests.rollout.talk import CALLS, USER, WAIT, error

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

ADMIN = "an-admin-token-of-mine"
SECRET = "what-the-other-one-said"
QUIET = 0.3  # seconds after which a server that has answered and keeps its connection is taken to wait
OURS = {
    "model", "messages", "input_ids", "stream", "logprobs", "return_meta_info", "no_stop_trim", "return_routed_experts",
    "routed_experts_start_len", "tools",
}  # fmt: skip
OVERRIDES = (
    "X-HTTP-Method-Override: DELETE\r\nX-HTTP-Method: DELETE\r\nX-Method-Override: PUT\r\n"
    "X-Original-URL: /sessions/{other}\r\nX-Rewrite-URL: /sessions/{other}\r\nX-Forwarded-Prefix: /sessions/{other}\r\n"
    "X-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\nX-Session-Id: {other}\r\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A server, the agent's session with its key, and somebody else's session."""

    url: str
    mine: str
    key: str
    other: str
    admin: httpx.Client

    def send(self, raw: str | bytes) -> bytes:
        """Send bytes, and all that comes back until the server closes or has nothing more to say."""
        url = httpx.URL(self.url)
        filled = raw if isinstance(raw, bytes) else self.filled(raw).encode("latin-1")
        parts = [b""]
        with socket.create_connection((url.host, url.port or 80), timeout=WAIT) as client:
            client.sendall(filled)
            with contextlib.suppress(TimeoutError, ConnectionError):
                while data := client.recv(65536):
                    parts.append(data)
                    client.settimeout(QUIET)
        return b"".join(parts)

    def filled(self, text: str) -> str:
        """With ids and key in their places."""
        return text.replace("{mine}", self.mine).replace("{other}", self.other).replace("{key}", self.key)

    def state(self) -> list[Any]:
        """All that an admin sees."""
        return [self.admin.get(f"/sessions/{session}").json() for session in (self.mine, self.other)]


@pytest.fixture(scope="module", params=[1, 2], ids=["process", "gate"])
def sandbox(
    request: pytest.FixtureRequest, tiny_dir: Path, scripted: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sandbox]:
    """A server's own process, or a gate with two; each session has said something."""
    scripted.reset()
    port, folder = free_port(), tmp_path_factory.mktemp("sandbox")
    options = ["--no-probe", "--auth", "tokens", "--workers", str(request.param), "--max-body", "100000"]
    command = sessions_command(tiny_dir, upstream=scripted.url, port=port, extra=options)
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    server = Service("sessions", command, url=url, log=log, env={"PACENOTE_AUTH_TOKENS": ADMIN})
    headers = {"authorization": f"Bearer {ADMIN}"}
    with server, httpx.Client(base_url=url, headers=headers, timeout=WAIT, trust_env=False) as http:
        server.wait_healthy(WAIT)
        made = [http.post("/sessions").json() for _ in range(2)]
        for session, text in zip(made, ("mine", SECRET), strict=True):
            path, bearer = f"/sessions/{session['session_id']}", {"authorization": f"Bearer {session['api_key']}"}
            body = {"messages": [{"role": "user", "content": text}]}
            assert http.post(f"{path}/v1/chat/completions", json=body, headers=bearer).status_code == 200
        mine, other = made
        yield Sandbox(url=url, mine=mine["session_id"], key=mine["api_key"], other=other["session_id"], admin=http)
    assert "Traceback" not in log.read_text()


@pytest.fixture
def kept(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox; whatever the test sends changes no session."""
    before = sandbox.state()
    yield sandbox
    assert sandbox.state() == before


TARGETS = [
    "/sessions/{other}/v1/models", "/sessions/{other}/v1/chat/completions", "/sessions/{other}", "/sessions/{mine}",
    "/sessions/{mine}/", "/sessions/{mine}/samples", "/sessions/{mine}/samples/", "/sessions/{mine}/%73amples",
    "/sessions/{mine}/../{other}/v1/models", "/sessions/{mine}/%2e%2e/{other}/v1/models", "/sessions/{mine}%2Fsamples",
    "/sessions/{mine}%2F..%2F{other}/v1/models", "//sessions/{other}/v1/models", "/sessions//{other}/v1/models",
    "/sessions/{mine}/v1/../samples", "/sessions/{mine}/v1/%2e%2e/samples", "/sessions/{mine}/v1/..%2fsamples",
    "/sessions/{mine}/v1/../../{other}", "/sessions/{mine}/v1/%2e%2e/%2e%2e/{other}", "/sessions/{mine}/v1//samples",
    "/sessions/{mine}%00/v1/models", "/sessions/{mine}%0a/v1/models", "/sessions/{mine}%0d%0aHost:%20x/samples",
    "http://x/sessions/{other}/v1/models", "http://{mine}@x/sessions/{other}", "http://x:1/sessions/{other}/samples",
    "/sessions/{mine};/../{other}", "/sessions/{other}?/sessions/{mine}", "/sessions/{other}#/sessions/{mine}",
    "/sessions/{mine}\\..\\{other}", "/sessions/{mine}/v1%2f..%2fsamples", "/sessions/%7bmine%7d/v1/models",
    "/metrics", "//metrics", "/metrics/", "/metrics%2f", "/%6d%65trics", "/metrics?x", "http://x/metrics",
    "/metrics%0a",
    "/sessions/{mine}/metrics", "/sessions/{mine}/v1/../../../metrics", "/sessions", "/sessions/", "/sessions%2f",
    "/sessions/{mine}/v1/loads", "/sessions/{mine}/v1/conversations/1", "/sessions/{mine}/v1/files/x/content",
    "/sessions/{mine}/flush_cache", "/sessions/{mine}/v1/../flush_cache", "/sessions/{mine}/server_info/../metrics",
    "/sessions/{mine}/get_weights_by_name", "/", "*", "x:1", "/health/../metrics", "/openapi.json/../metrics",
]  # fmt: skip


METHODS = ("GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "CONNECT")


@pytest.mark.parametrize("target", TARGETS)
def test_no_path_leads_out(kept: Sandbox, engine: ScriptedEngine, target: str) -> None:
    for method in METHODS:
        body = json.dumps({"messages": [USER], "include_superseded": True}) if method == "POST" else ""
        answer = kept.send(
            f"{method} {target} HTTP/1.1\r\nHost: {{other}}\r\nAuthorization: Bearer {{key}}\r\nConnection: close\r\n"
            f"{OVERRIDES}Content-Length: {len(body)}\r\n\r\n{body}"
        )
        status = answer.split(b" ")[1]
        assert status in (b"400", b"401", b"403", b"404", b"405", b"307"), (method, target, answer)
        assert SECRET.encode() not in answer
        assert b"pacenote_" not in answer
    assert engine.bodies == []


def request(line: str, *headers: str, key: str = "{key}") -> str:
    return "\r\n".join([line, "Host: x", f"Authorization: Bearer {key}", *headers, "", ""])


MODELS = "GET /sessions/{mine}/v1/models HTTP/1.1"
INNER = request("GET /sessions/{other} HTTP/1.1")
SMUGGLED = {
    "pipelined": request(MODELS) + INNER,
    "after close": request(MODELS, "Connection: close") + INNER,
    "kept alive by 1.0": request(MODELS.replace("1.1", "1.0"), "Connection: keep-alive") + INNER,
    "body of a GET": request(MODELS, f"Content-Length: {len(INNER)}") + INNER,
    "length and chunks": request(MODELS, "Content-Length: 4", "Transfer-Encoding: chunked") + "0\r\n\r\n" + INNER,
    "chunks and length": request(MODELS, "Transfer-Encoding: chunked", "Content-Length: 4") + "0\r\n\r\n" + INNER,
    "chunks, spelled oddly": request(MODELS, "Transfer-Encoding: xchunked") + "0\r\n\r\n" + INNER,
    "chunks twice": request(MODELS, "Transfer-Encoding: chunked", "Transfer-Encoding: identity") + "0\r\n\r\n" + INNER,
    "chunks with a tab": request(MODELS, "Transfer-Encoding:\tchunked") + "0\r\n\r\n" + INNER,
    "name with a space": request(MODELS, "Transfer-Encoding : chunked") + "0\r\n\r\n" + INNER,
    "two lengths": request(MODELS, "Content-Length: 0", f"Content-Length: {len(INNER)}") + INNER,
    "length with a sign": request(MODELS, "Content-Length: +0") + INNER,
    "folded": request(MODELS, "X: y", " Transfer-Encoding: chunked") + "0\r\n\r\n" + INNER,
    "bare line feeds": request(MODELS, "X: y\nTransfer-Encoding: chunked") + "0\r\n\r\n" + INNER,
    "bare returns": request(MODELS, "X: y\rContent-Length: 5") + INNER,
    "upgrade": request(MODELS, "Connection: upgrade, http2-settings", "Upgrade: h2c", "HTTP2-Settings: AA") + INNER,
    "websocket": request(MODELS, "Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x") + INNER,
    "space in the target": request("GET /sessions/{mine}/v1/models /sessions/{other} HTTP/1.1"),
    "two lines": "GET /sessions/{mine}/v1/models HTTP/1.1\nGET /sessions/{other} HTTP/1.1\r\n\r\n" + INNER,
    "no version": "GET /sessions/{mine}/v1/models\r\n\r\n" + INNER,
    "another version": request("GET /sessions/{other} HTTP/2.0") + INNER,
    "key in a trailer": "GET /sessions/{mine} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    "0\r\nAuthorization: Bearer {key}\r\n\r\n",
    "two keys": request("GET /sessions/{other} HTTP/1.1", "Authorization: Bearer {key}", "X-Api-Key: {key}"),
}


@pytest.mark.parametrize("case", SMUGGLED)
def test_nothing_rides_along(kept: Sandbox, engine: ScriptedEngine, case: str) -> None:
    """Whatever is hidden in a request, or follows it: each is let in, or not, by its own path and its own token."""
    answer = kept.send(SMUGGLED[case])
    assert answer.startswith(b"HTTP/1.1 ")
    statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert set(statuses) <= {200, 400, 401, 403, 404, 405}
    assert statuses.count(200) <= 1  # of the listing that is the agent's
    assert SECRET.encode() not in answer
    assert b'"records"' not in answer
    assert engine.bodies == []


FIELDS = (
    "input_ids", "logprobs", "return_meta_info", "return_routed_experts", "routed_experts_start_len", "no_stop_trim",
    "weight_version", "weight_versions", "rid", "extra_key", "cache_salt", "priority", "data_parallel_rank",
    "lora_path",
    "session_id", "session_params", "custom_logit_processor", "custom_params", "bootstrap_host", "bootstrap_port",
    "bootstrap_room", "return_hidden_states", "return_prompt_token_ids", "return_token_ids", "regex", "ebnf",
    "stop_regex", "continue_final_message", "skip_special_tokens", "separate_reasoning", "stream_reasoning", "task",
    "images_config", "video_config", "mm_processor_kwargs", "watermark", "meta_info", "routed_experts", "cached_tokens",
    "chat_template", "add_generation_prompt", "logprob_start_len", "sampling_params", "image_data", "top_logprobs_num",
)  # fmt: skip
DIALECTS: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [USER]},
    "messages": {"messages": [USER], "max_tokens": 4},
    "responses": {"input": "a"},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fields_that_are_not_an_agents(sandbox: Sandbox, engine: ScriptedEngine, dialect: str) -> None:
    headers, url = {"authorization": f"Bearer {sandbox.key}"}, f"{sandbox.url}/sessions/{sandbox.mine}/v1/{dialect}"
    answer = httpx.post(url, json=DIALECTS[dialect], headers=headers, timeout=WAIT, trust_env=False)
    assert answer.status_code == 200
    for value in ([1, 2], "http://evil.example/x", 7, {"a": 1}):
        body = DIALECTS[dialect] | dict.fromkeys(FIELDS, value)
        answer = httpx.post(url, json=body, headers=headers, timeout=WAIT, trust_env=False)
        assert answer.status_code == 200, answer.text
    plain, *others = engine.bodies
    assert set(plain) <= OURS | set(CLIENT_FIELDS)
    assert others == [plain] * 4


def test_a_template_of_the_agents_own(kept: Sandbox, engine: ScriptedEngine) -> None:
    url = f"{kept.url}/sessions/{kept.mine}/v1/chat/completions"
    for name in ("chat_template", "tokenize", "tools", "messages", "conversation", "documents", "eos_token"):
        body = {"messages": [USER], "chat_template_kwargs": {name: "{{ 1 }}"}}
        answer = httpx.post(url, json=body, headers={"x-api-key": kept.key}, timeout=WAIT, trust_env=False)
        assert "cannot be set" in error(answer, 400, "bad_request"), name
    assert engine.bodies == []


ENDLESS = {
    "a line": "GET /health HTTP/1.1\r\nX: ",
    "a target": "GET /health?",
    "a trailer": "POST /sessions/{mine}/v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer {key}\r\n"
    "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: ",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_head_without_end(kept: Sandbox, case: str) -> None:
    """It is refused before it has filled memory; nobody need have shown a key."""
    url = httpx.URL(kept.url)
    with socket.create_connection((url.host, url.port or 80), timeout=WAIT) as client:
        client.sendall(kept.filled(ENDLESS[case]).encode())
        sent, said = 0, b""
        client.settimeout(0.01)
        while not said and sent < 16 << 20:
            with contextlib.suppress(TimeoutError):
                try:
                    sent += client.send(b"a" * 65536)
                    said = client.recv(65536)
                except ConnectionError:  # closed, before what it said was read
                    break
        assert sent < 8 << 20
        assert not said or said.startswith(b"HTTP/1.1 431 ")


class Elsewhere:
    """A host that nobody should be sent to, and an engine that sends there."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.status = 200

    async def engine(self, request: Request) -> Response:
        """Answers as told, with a place to go to."""
        self.seen.append((request.method, request.url.path, dict(request.headers), await request.body()))
        return JSONResponse({"ok": True}, self.status, {"location": f"{request.base_url}elsewhere"})

    async def elsewhere(self, request: Request) -> Response:
        """Where redirections lead."""
        raise AssertionError("a redirection was followed")

    def app(self) -> Starlette:
        """The ASGI application."""
        methods = ["GET", "POST"]
        elsewhere = Route("/elsewhere", self.elsewhere, methods=methods)
        return Starlette(routes=[elsewhere, Route("/{path:path}", self.engine, methods=methods)])


@pytest.fixture(scope="module")
def place() -> Elsewhere:
    """The engine."""
    return Elsewhere()


@pytest.fixture(scope="module")
def before_it(serve: Callable[..., Served], served_app: type[Served], place: Elsewhere) -> Iterator[Served]:
    """A session server in front of it."""
    with (
        served_app(place.app()) as engine,
        serve(upstream=engine.url, auth="tokens", tokens=(ADMIN,), max_body=10_000) as served,
    ):
        yield served


@pytest.fixture
def agent(before_it: Served, place: Elsewhere) -> Iterator[httpx.Client]:
    """A client with the key of its session; the engine is as new."""
    place.seen.clear()
    place.status = 200
    with httpx.Client(base_url=before_it.url, timeout=WAIT, trust_env=False) as http:
        made = http.post("/sessions", headers={"authorization": f"Bearer {ADMIN}"}).json()
        http.base_url = httpx.URL(f"{before_it.url}/sessions/{made['session_id']}/")
        http.headers["authorization"] = f"Bearer {made['api_key']}"
        yield http
    assert 500 not in before_it.statuses


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirections_are_not_followed(agent: httpx.Client, place: Elsewhere, status: int) -> None:
    place.status = status
    for path, body in (("v1/chat/completions", {"messages": [USER]}), ("v1/tokenize", {"prompt": "a"})):
        assert "the engine answered" in error(agent.post(path, json=body), 502, "upstream_error")
    assert [path for _, path, _, _ in place.seen] == ["/v1/chat/completions", "/v1/tokenize"]


POSTS: list[tuple[str, dict[str, Any]]] = [
    ("v1/tokenize", {"model": "m", "prompt": ["a", "b"], "add_special_tokens": False}),
    ("v1/detokenize", {"tokens": [[1, 2], [3]], "skip_special_tokens": True}),
    ("v1/embeddings", {"model": "m", "input": "a", "encoding_format": "base64", "dimensions": None}),
    ("v1/rerank", {"query": "a", "documents": ["b"], "top_n": 1, "return_documents": True}),
    ("v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1], "apply_softmax": True}),
    ("v1/classify", {"input": ["a"]}),
]


@pytest.mark.parametrize(("path", "body"), POSTS)
def test_what_an_agent_may_post(agent: httpx.Client, place: Elsewhere, path: str, body: dict[str, Any]) -> None:
    sent = json.dumps(body).encode()
    answer = agent.post(path, content=sent, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 200, answer.text
    [(method, asked, headers, content)] = place.seen
    assert (method, asked, json.loads(content)) == ("POST", f"/{path}", body)
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers


WORSE: list[tuple[str, dict[str, Any], str]] = [
    ("v1/embeddings", {"input": [{"image": "http://evil.example/x"}]}, "input"),
    ("v1/embeddings", {"input": [10**9]}, "input"),
    ("v1/embeddings", {"input": "a", "lora_path": "x"}, "lora_path"),
    ("v1/embeddings", {"input": "a", "rid": "somebody's"}, "rid"),
    ("v1/embeddings", {"input": "a", "embed_overrides": [[[1.0]]]}, "embed_overrides"),
    ("v1/classify", {"input": [[10**9]]}, "input"),
    ("v1/classify", {"input": "a", "priority": 9}, "priority"),
    (
        "v1/rerank",
        {"query": [{"type": "image_url", "image_url": {"url": "http://evil/"}}], "documents": ["b"]},
        "query",
    ),
    ("v1/rerank", {"query": "a", "documents": [[{"type": "image_url"}]]}, "documents"),
    ("v1/score", {"query": [10**9], "items": ["b"]}, "query"),
    ("v1/score", {"query": "a", "items": [[10**9]]}, "items"),
    ("v1/score", {"query": "a", "items": "b", "return_pooled_hidden_states": True}, "return_pooled_hidden_states"),
    ("v1/tokenize", {"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
    ("v1/tokenize", {"prompt": "a", "input_ids": [1]}, "input_ids"),
    ("v1/detokenize", {"tokens": ["x"]}, "tokens"),
    ("v1/detokenize", {"tokens": [1], "bootstrap_host": "evil.example"}, "bootstrap_host"),
]


@pytest.mark.parametrize(("path", "body", "name"), WORSE)
def test_what_an_engine_would_do_for_an_agent(
    agent: httpx.Client, place: Elsewhere, before_it: Served, path: str, body: dict[str, Any], name: str
) -> None:
    answer = agent.post(path, json=body)
    assert name in error(answer, 403, "permission_denied")
    assert answer.json()["error"]["param"] == name
    assert place.seen == []
    if path != "v1/detokenize":
        admin = {"authorization": f"Bearer {ADMIN}"}
        assert agent.post(path, json=body, headers=admin).status_code == 200  # who may ask the engine itself


def test_a_field_that_comes_twice(agent: httpx.Client, place: Elsewhere) -> None:
    """No two parsers read what is sent on differently."""
    raw = b'{"input": [{"image": "http://evil.example/"}], "input": "a", "model": "m"}'
    assert agent.post("v1/embeddings", content=raw).status_code == 200
    [(_, _, _, content)] = place.seen
    assert content == b'{"input":"a","model":"m"}'
    for raw in (b"", b"[]", b"a=b", b'{"input": "a"}\0', json.dumps({"input": "a"}).encode("utf-16")):
        error(agent.post("v1/embeddings", content=raw), 400, "bad_request")
    assert len(place.seen) == 1


def test_what_an_agent_may_not_read(agent: httpx.Client, place: Elsewhere) -> None:
    """Gateways keep conversations and files of everybody under v1, and loads tell of everybody's work."""
    for path in ("v1/loads", "v1/conversations/1/items", "v1/skills", "v1/anything", "v1/tokenize", "v1/score"):
        for method in ("GET", "HEAD"):
            assert agent.request(method, path).status_code == 403
    assert place.seen == []
    assert agent.request("GET", "health", content=b'{"a": 1}').status_code == 200
    [(_, path, _, content)] = place.seen
    assert (path, content) == ("/health", b"")


def test_a_client_that_leaves_while_it_sends(agent: httpx.Client, before_it: Served, place: Elsewhere) -> None:
    """It is no defect of this server."""
    url = httpx.URL(before_it.url)
    head = f"POST {agent.base_url.path}v1/tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    for _ in range(3):
        with socket.create_connection((url.host, url.port or 80), timeout=WAIT) as client:
            client.sendall(f"{head}Authorization: {agent.headers['authorization']}\r\n\r\n".encode() + b"{")
    assert agent.post("v1/tokenize", json={"prompt": "a"}).status_code == 200
    assert len(place.seen) == 1


def test_a_call_is_no_way_to_another_role(sandbox: Sandbox, engine: ScriptedEngine) -> None:
    """Messages go upstream as they came: what an engine would follow in them is refused."""
    url = f"{sandbox.url}/sessions/{sandbox.mine}/v1/chat/completions"
    image = {"type": "image_url", "image_url": {"url": "http://evil.example/x"}}
    for message in (
        {"role": "user", "content": [{"type": "text", "text": "a"}, image]},
        {"role": "user", "content": [image]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]},
        {"role": "developer", "content": "a"},
        {"role": "assistant", "content": "a", "tool_calls": [*CALLS, {"function": {"name": 7}}]},
    ):
        body = {"messages": [message]}
        answer = httpx.post(url, json=body, headers={"x-api-key": sandbox.key}, timeout=WAIT, trust_env=False)
        error(answer, 400, "bad_request")
    assert engine.bodies == []
