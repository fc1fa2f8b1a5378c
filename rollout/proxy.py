"""Paths under a session that are not served here, passed on to the engine: what reads, not what generates or changes.

The host is always the upstream's. A path is taken apart, checked and put together again; of the headers only those
below go either way.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable

import httpx
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from pacenote.rollout.agent_posts import AGENT_POSTS, agent_body
from pacenote.rollout.auth import ADMIN
from pacenote.rollout.errors import BadRequest, ClientGone, Forbidden, UpstreamError, UpstreamTimeout
from pacenote.rollout.request_limits import USUAL, RequestLimits
from pacenote.rollout.sglang import refusal

METHODS = ("GET", "HEAD", "POST")
REQUEST_HEADERS = ("accept", "content-type", "user-agent", "x-request-id", "traceparent", "tracestate")
"""Headers of a client's request that reach the engine. Tokens, cookies, routing and forwarding headers do not."""
DROPPED = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "trailers",
    "transfer-encoding", "upgrade", "content-length", "content-encoding", "server", "date", "set-cookie", "location",
})  # fmt: skip
"""Headers of an engine's answer that do not reach the client, with those that its `connection` names."""
AGENT_GETS = frozenset({"health"})
"""What is passed on with a session's key besides AGENT_POSTS: other paths may speak of other sessions."""

_PATH = re.compile(r"[A-Za-z0-9._~!$&'()*+,=:@/-]+")
_GENERATES = re.compile(
    r"(^|/)([^/]*(generat|completion|inference)[^/]*|chat|responses|messages|invocations|batches|files|api|predict|"
    r"infer|pooling|speech|transcriptions|translations|realtime|interactions|images)(/|$)"
)
_CHANGES = re.compile(
    r"weight|lora|cache|memory_occupation|profil|pause|continue|resume|abort|cancel|session|internal_state|logging|"
    r"expert_distribution|slow_down|freeze|worker|sleep|wake|rpc|scale|reset|dump|load_|(un|re|up)load|shutdown|"
    r"admin|wasm|mesh|tokenizers|remote|checker|bootstrap|register|corpus|corpora|trace_level|role_switch"
)
_UNRECORDED = (
    "{path} generates tokens that this server could not record: chat with POST /sessions/{{id}}/v1/chat/completions"
)


_PLACE = re.compile(r"/sessions/([^/]+)/(.+)", re.DOTALL)
_QUERY = re.compile(rb"[\x21-\x7e]*")


class Proxy:
    """ASGI: the paths that no other route serves.

    Args:
        upstream: base URL of the engine or gateway.
        timeout: seconds that the engine may be silent.
        find: raises for a session that is gone.
        limits: of one request.
    """

    def __init__(
        self, upstream: str, *, timeout: float, find: Callable[[str], object], limits: RequestLimits = USUAL
    ) -> None:
        self._base = httpx.URL(upstream.rstrip("/"))
        self._find = find
        self._timeout = timeout
        self._limits = limits
        self._client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            timeout=httpx.Timeout(timeout, connect=min(10.0, timeout), pool=None),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the pool."""
        await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or say that there is no such path."""
        if scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)
            return
        found = _PLACE.fullmatch(scope["path"])
        if found is None:
            raise HTTPException(404)
        if scope["method"] not in METHODS:
            raise HTTPException(405, headers={"allow": ", ".join(METHODS)})
        self._find(found[1])
        answer = await self.forward(Request(scope, receive, send), found[2])
        await answer(scope, receive, send)

    async def forward(self, request: Request, rest: str) -> Response:
        """The engine's answer.

        Args:
            request: the client's.
            rest: the path below the session.

        Raises:
            BadRequest: a path that cannot be, one that generates, or a body that is nested too deeply.
            Forbidden: a path that changes the engine, or a path or a field that a session's key does not open.
            UpstreamError: no answer, a redirection, or a status of 500 and above.
            UpstreamTimeout: no answer in time.
        """
        path = check_path(rest)
        agent = not request.scope.get(ADMIN, True)
        if agent and path not in (AGENT_POSTS if request.method == "POST" else AGENT_GETS):
            raise Forbidden(f"{request.method} {path} needs an admin token: a session's key does not open it")
        target = f"{self._base.path.rstrip('/')}/{path}".encode()
        query: bytes = request.scope["query_string"]
        if not _QUERY.fullmatch(query):
            raise BadRequest("expected a query of printable ASCII characters")
        url = self._base.copy_with(raw_path=target + (b"?" + query if query else b""))
        headers = {name: request.headers[name] for name in REQUEST_HEADERS if name in request.headers}
        headers |= {"accept-encoding": "identity"} | ({"content-type": "application/json"} if agent else {})
        content = await self._content(request, path if agent else None)
        sent = self._client.build_request(request.method, url, headers=headers, content=content)
        answer = await self._send(request, sent)
        if answer.status_code >= 500 or answer.is_redirect:
            async with contextlib.aclosing(answer):
                raise refusal(answer.status_code, await answer.aread())
        named = {name.strip().lower() for name in answer.headers.get("connection", "").split(",")}
        kept = [(name, value) for name, value in answer.headers.multi_items() if name.lower() not in DROPPED | named]
        passed = StreamingResponse(_body(answer), answer.status_code, background=BackgroundTask(answer.aclose))
        passed.raw_headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in kept]
        return passed

    async def _content(self, request: Request, agents: str | None) -> bytes:
        """What is sent on of a body; `agents` is the path if an agent asks for it."""
        try:
            raw = await request.body()
        except ClientDisconnect as error:
            raise ClientGone("the client closed its connection before its request had come") from error
        if agents in AGENT_GETS:
            return b""
        await run_in_threadpool(self._limits.check_depth, raw)
        return raw if agents is None else await run_in_threadpool(agent_body, agents, raw)

    async def _send(self, request: Request, sent: httpx.Request) -> httpx.Response:
        """The answer's head, unless the client leaves first; its connection to the engine is closed then."""
        task = asyncio.ensure_future(self._client.send(sent, stream=True))
        gone = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone("the client closed its connection before the answer was ready")
            return task.result()
        except httpx.TimeoutException as error:
            raise UpstreamTimeout(f"the engine did not answer within {self._timeout:g} s") from error
        except httpx.HTTPError as error:
            raise UpstreamError(f"no answer from the engine: {error or type(error).__name__}") from error
        finally:
            gone.cancel()
            task.cancel()


def check_path(path: str) -> str:
    """A decoded path below the upstream, without a slash at its end, that may be asked for.

    Raises:
        BadRequest: empty or dotted parts, other characters than a plain path's, or a path that generates tokens.
        Forbidden: a path that changes the engine.
    """
    path = path.removesuffix("/")
    parts = path.split("/")
    if not _PATH.fullmatch(path) or any(part in ("", ".", "..") for part in parts):
        raise BadRequest(f"expected a plain path of letters, digits and -._~, without empty or dotted parts: {path!r}")
    lower = path.lower()
    if _CHANGES.search(lower):
        raise Forbidden(f"/{path} changes the engine: ask the engine itself, not a session")
    if lower not in AGENT_POSTS and _GENERATES.search(lower):
        raise BadRequest(_UNRECORDED.format(path=f"/{path}"))
    return path


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(answer):  # also when the client leaves half way
        async for data in answer.aiter_bytes():
            yield data


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
