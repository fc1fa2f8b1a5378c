"""What an agent may post to the engine with its session's key: paths, their fields, and the fields' types.

An engine takes more than that on these paths: token ids that end its scheduler, images by URL that it fetches itself,
adapters, ids of other requests. Whoever holds an admin token may use all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from pacenote.rollout.errors import BadRequest, Forbidden

Check = Callable[[object], bool]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | bool | int | float)


def _are_numbers(value: object) -> bool:
    if not isinstance(value, list):
        return False
    return all(type(item) is int or (isinstance(item, list) and all(type(i) is int for i in item)) for item in value)


_MODEL: Mapping[str, Check] = {"model": _is_text}
AGENT_POSTS: Mapping[str, Mapping[str, Check]] = {
    "v1/tokenize": {**_MODEL, "prompt": _is_texts, "add_special_tokens": _is_scalar},
    "v1/detokenize": {**_MODEL, "tokens": _are_numbers, "skip_special_tokens": _is_scalar},
    "v1/embeddings": {
        **_MODEL, "input": _is_texts, "encoding_format": _is_text, "dimensions": _is_scalar, "user": _is_text,
    },
    "v1/rerank": {
        **_MODEL, "query": _is_text, "documents": _is_texts, "instruct": _is_text, "top_n": _is_scalar,
        "return_documents": _is_scalar,
    },
    "v1/score": {
        **_MODEL, "query": _is_text, "items": _is_texts, "label_token_ids": _are_numbers, "apply_softmax": _is_scalar,
        "item_first": _is_scalar,
    },
    "v1/classify": {**_MODEL, "input": _is_texts, "user": _is_text},
}  # fmt: skip
"""Path -> field -> whether a value may be sent (SGLang 0.5.23, `entrypoints/openai/protocol.py`)."""


def agent_body(path: str, raw: bytes) -> bytes:
    """A body with nothing in it but what an agent may post, written anew: no two parsers read it differently.

    Args:
        path: one of AGENT_POSTS.
        raw: what came.

    Raises:
        BadRequest: no JSON object.
        Forbidden: a field that is not listed, or a value of another type than it may have.
    """
    try:
        body: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    checks = AGENT_POSTS[path]
    for name, value in body.items():
        if name not in checks:
            known = ", ".join(checks)
            raise Forbidden(f"POST {path} takes {known} with a session's key, not {name[:80]!r}", param=name[:80])
        if value is not None and not checks[name](value):
            raise Forbidden(f"POST {path} takes {name} as texts or numbers with a session's key", param=name)
    return orjson.dumps(body)
