"""Who may do what. Admin tokens open everything; each session has a key of its own that opens what its agent needs.

A session's key is an HMAC of the session's id under an admin token: nothing is stored, it outlives a restart, and
whoever holds the admin token can compute it. A sandbox gets the key, never the token: with it an agent reaches its own
chat and model listings, but no other session, no collection, no deletion.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pacenote.rollout.errors import Forbidden, SessionError, Unauthorized
from pacenote.rollout.request_log import CODE

VARIABLE = "PACENOTE_AUTH_TOKENS"
ADMIN = "pacenote.admin"
"""In an ASGI scope: whether the caller may do everything. Absent where nobody is asked for a token."""
OPEN = ("/health", "/openapi.json")
SHORTEST = 16  # characters of a token
AGENT_PATHS = frozenset({"model_info", "get_model_info", "server_info", "get_server_info", "model/info", "health"})
"""Paths under a session, besides v1/..., that its key opens."""

_TOKEN = re.compile(r"[\x21-\x7e]+")
_SESSION = re.compile(r"/sessions/([^/]+)(?:/(.*))?", re.DOTALL)


class Keys:
    """Admin tokens, and the session keys that follow from them.

    Args:
        tokens: admin tokens; the first one makes new session keys, and keys made by any of them are good.

    Raises:
        ValueError: none, or one that is too short or has other characters than printable ASCII.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        if not tokens:
            raise ValueError(f"expected at least one token with --auth tokens: give --auth-file or set {VARIABLE}")
        for place, token in enumerate(tokens):
            if len(token) < SHORTEST or not _TOKEN.fullmatch(token):
                raise ValueError(
                    f"expected tokens of at least {SHORTEST} printable ASCII characters without spaces, got "
                    f"{len(token)} characters in token {place + 1}"
                )
        self._tokens = [token.encode() for token in tokens]

    def issue(self, session_id: str) -> str:
        """The session's key."""
        return _key(self._tokens[0], session_id)

    def admin(self, token: str) -> bool:
        """Whether this is an admin token."""
        return _any(token, self._tokens)

    def opens(self, token: str, session_id: str) -> bool:
        """Whether this is the session's key."""
        return _any(token, [_key(secret, session_id).encode() for secret in self._tokens])


class Guard:
    """ASGI: lets a request through if its token opens its path; those of OPEN need none.

    Args:
        app: what is guarded.
        keys: see `Keys`.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass the request on."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                scope[ADMIN] = self._admit(scope)
            except SessionError as error:
                scope[CODE] = error.code
                headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
                await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> bool:
        """True for an admin token, False for the key of the session whose path this is."""
        token = _presented(scope)
        if token is None:
            raise Unauthorized("this server asks for a token: send authorization: Bearer TOKEN")
        if self._keys.admin(token):
            return True
        found = _SESSION.fullmatch(scope["path"])
        if found is None or not self._keys.opens(token, found[1]):
            raise Unauthorized("the token is no admin token, and not the key of this path's session")
        rest = found[2] or ""
        if not rest.startswith("v1/") and rest not in AGENT_PATHS:
            raise Forbidden("a session's key opens its chat and model listings; this needs an admin token")
        return False


def read_tokens(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Admin tokens: one a line of the file (# starts a comment), or else of the variable PACENOTE_AUTH_TOKENS.

    Raises:
        ValueError: the file cannot be read.
    """
    if file is None:
        return tuple(environment.get(VARIABLE, "").replace(",", " ").split())
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected --auth-file {file} as a file of tokens: {error}") from error
    return tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def _presented(scope: Scope) -> str | None:
    """The token in `authorization: Bearer`, or in `x-api-key` as Anthropic's clients send it."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip() or None


def _key(secret: bytes, session_id: str) -> str:
    text = b"pacenote session\0" + session_id.encode(errors="surrogatepass")
    return f"pn-{hmac.new(secret, text, 'sha256').hexdigest()}"


def _any(token: str, secrets: Sequence[bytes]) -> bool:
    """Compares with all of them, each in constant time."""
    given = token.encode(errors="surrogatepass")
    return sum([hmac.compare_digest(given, secret) for secret in secrets]) > 0
