"""The session server's OpenAPI document: GET /openapi.json (spec.openapis.org/oas/v3.1.1). docs/protocol.md in short.

A table of the operations, one line each; what all of them share is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pacenote.rollout.openapi_schemas import Schema, ref, schemas
from pacenote.rollout.request_limits import RequestLimits

PATH = "/openapi.json"
_ID = "/sessions/{session_id}"
_ABOUT = (
    "OpenAI chat in; exact tokens, logprobs and routed experts of what was sampled kept for training. GET, HEAD and "
    "POST of other paths under /sessions/{session_id}/ go to the engine, as far as they neither generate tokens nor "
    "change it; with a session's key only POST of v1/tokenize, v1/detokenize, v1/embeddings, v1/rerank, v1/score and "
    "v1/classify, and GET of health, do."
)
_STATUSES = {
    400: "bad_request, role_not_allowed, not_linear, match_failed, template_error, context_length_exceeded or "
    "session_too_large: the request cannot be served.",
    401: "invalid_api_key: no token, or one that does not open this path.",
    403: "permission_denied: a session's key where an admin token is needed.",
    404: "session_not_found: a session that was never started.",
    410: "session_deleted or session_expired.",
    413: "body_too_large: a body above --max-body.",
    421: "misdirected_request: a session that another process of this server holds.",
    422: "idempotency_key_reused: an Idempotency-Key that came with another body before.",
    431: "The request's head is too large.",
    499: "client_closed_request: nobody reads this answer.",
    500: "internal_error: a defect of this server.",
    502: "upstream_error: the engine did not answer, or its answer is not one that can be trained on.",
    503: "store_unavailable, upstream_unproven or worker_unavailable: try again soon.",
    504: "upstream_timeout: the engine took too long.",
    507: "store_full or quota_exceeded: nothing new can be kept.",
}
_EVERY = (413, 431, 500, 503)
_GUARDED = (401, 403)
_OF_A_SESSION = (410, 421)
_CHATS = (400, 422, 499, 502, 504, 507)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """One method of one path.

    Attributes:
        about: its summary.
        role: who may: "open", "session" (an admin token or the session's key) or "admin".
        answer: status -> (media type, schema) of what it answers when all is well.
        fails: statuses beside those that all have.
        body: schema of what it reads, if it must be there.
        optional: schema of what it reads, if it may be left out.
        error: schema of its errors.
        keyed: it heeds Idempotency-Key.
    """

    about: str
    role: str
    answer: dict[str, Schema] = field(default_factory=dict)
    status: int = 200
    fails: Sequence[int] = ()
    body: Schema | None = None
    optional: Schema | None = None
    error: Schema = field(default_factory=lambda: ref("Error"))
    keyed: bool = False


def _json(name: str) -> dict[str, Schema]:
    return {"application/json": ref(name)}


def _chat(about: str, request: str, answer: str, error: Schema | None = None) -> _Operation:
    """A chat in some dialect."""
    return _Operation(
        about=about,
        role="session",
        answer=_json(answer) | {"text/event-stream": ref("Event")},
        fails=(*_OF_A_SESSION, *_CHATS),
        body=ref(request),
        error=error or ref("Error"),
        keyed=True,
    )


def _info(about: str, answer: str) -> _Operation:
    return _Operation(about=about, role="session", answer=_json(answer), fails=_OF_A_SESSION)


def _operations() -> dict[str, dict[str, _Operation]]:
    """Path -> method -> operation."""
    anthropic = {"anyOf": [ref("AnthropicError"), ref("Error")]}  # what all paths share is refused in OpenAI's shape
    raw: dict[str, Schema] = {"application/octet-stream": {}}
    counts = _Operation(
        about="Tokens of the prompt that /v1/messages would send.", role="session", answer=_json("Counted"),
        fails=(*_OF_A_SESSION, 400, 499), body=ref("MessagesRequest"), error=anthropic,
    )  # fmt: skip
    infos = dict.fromkeys(("model_info", "get_model_info", "server_info", "get_server_info"), "ModelInfo")
    infos |= dict.fromkeys(("v1/model/info", "v1/v1/model/info", "model/info"), "LiteModels")
    infos |= {"v1/models": "Models", "v1/models/{model}": "Model"}
    sessions = {
        "get": _Operation(about="What was said; empty for an unknown id.", role="admin", answer=_json("Session"),
                          fails=_OF_A_SESSION),
        "put": _Operation(about="Start a session of this id, or find it.", role="admin", answer=_json("Created"),
                          fails=(*_OF_A_SESSION, 400, 507)),
        "delete": _Operation(about="Forget a session; what is in flight is aborted.", role="admin", status=204,
                             fails=(421, 507)),
    }  # fmt: skip
    return {
        "/health": {"get": _Operation(about="Whether it answers.", role="open", answer=_json("Health"))},
        PATH: {"get": _Operation(about="This document.", role="open", answer={"application/json": {"type": "object"}})},
        "/metrics": {
            "get": _Operation(about="Prometheus's text.", role="admin", answer={"text/plain": {"type": "string"}})
        },
        "/sessions": {
            "post": _Operation(about="Start a session.", role="admin", answer=_json("Created"), fails=(507,))
        },
        _ID: sessions,
        f"{_ID}/samples": {
            "post": _Operation(about="Its samples, as safetensors.", role="admin", answer=raw,
                               fails=(*_OF_A_SESSION, 400, 404, 499), optional=ref("SamplesRequest"))
        },
        f"{_ID}/v1/chat/completions": {"post": _chat("OpenAI's chat.", "ChatRequest", "Completion")},
        f"{_ID}/v1/messages": {
            "post": _chat("Anthropic's Messages.", "MessagesRequest", "AnthropicMessage", anthropic)
        },
        f"{_ID}/v1/messages/count_tokens": {"post": counts},
        f"{_ID}/v1/responses": {"post": _chat("OpenAI's Responses.", "ResponsesRequest", "Response")},
        **{f"{_ID}/{path}": {"get": _info("About the model.", answer)} for path, answer in infos.items()},
    }  # fmt: skip


def document(*, version: str, guarded: bool, limits: RequestLimits) -> dict[str, Any]:
    """The document.

    Args:
        version: the server's.
        guarded: tokens are asked for.
        limits: of one request.
    """
    paths = {
        path: {method: _described(path, operation, guarded) for method, operation in methods.items()}
        for path, methods in _operations().items()
    }
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An admin token, or a session's key."},
        "header": {
            "type": "apiKey",
            "in": "header",
            "name": "x-api-key",
            "description": "The same, as Anthropic has it.",
        },
    }
    components: dict[str, Any] = {"schemas": schemas(limits)} | ({"securitySchemes": schemes} if guarded else {})
    info = {"title": "pacenote's session server", "version": version, "description": _ABOUT}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def openapi_route(made: dict[str, Any]) -> Route:
    """GET /openapi.json."""
    data = orjson.dumps(made)

    async def openapi(request: Request) -> Response:
        return Response(data, media_type="application/json")

    handler: Callable[[Request], Any] = openapi
    return Route(PATH, handler, methods=["GET"])


def _described(path: str, operation: _Operation, guarded: bool) -> dict[str, Any]:
    roles = {"open": [], "session": ["admin", "session"], "admin": ["admin"]}[operation.role]
    named = [name for name in ("session_id", "model") if f"{{{name}}}" in path]
    fails = sorted({*operation.fails, *_EVERY, *(_GUARDED if guarded and roles else ())})
    good: dict[str, Any] = {"description": "As asked for."}
    if operation.answer:
        good["content"] = {media: {"schema": schema} for media, schema in operation.answer.items()}
    failed = {"application/json": {"schema": operation.error}}
    made: dict[str, Any] = {
        "summary": operation.about,
        "parameters": [_parameter(name) for name in named] + ([_KEY] if operation.keyed else []),
        "responses": {str(operation.status): good}
        | {str(status): {"description": _STATUSES[status], "content": failed} for status in fails},
    }
    if guarded:
        made["security"] = [{scheme: [role]} for role in roles for scheme in ("bearer", "header")]
    schema = operation.body or operation.optional
    if schema is not None:
        made["requestBody"] = {
            "required": operation.body is not None,
            "content": {"application/json": {"schema": schema}},
        }
    return made


_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A request that is sent again under its key gets the answer of the first.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


def _parameter(name: str) -> dict[str, Any]:
    """An id is anything without a slash; "." and ".." do not arrive, clients take them out."""
    plain = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[A-Za-z0-9_-][A-Za-z0-9._~-]*$"}
    return {"name": name, "in": "path", "required": True, "schema": plain}
