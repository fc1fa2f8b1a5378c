"""The OpenAPI document against the server that it describes: complete, and true for whatever it lets a client send."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from pacenote.rollout.errors import SessionError
from pacenote.rollout.messages import ROLES
from pacenote.rollout.openapi import document
from pacenote.rollout.request_limits import RequestLimits
from pacenote.rollout.server import SessionConfig, create_app
from tests.rollout.talk import WAIT

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

ADMIN = "an-admin-token-of-mine"
LIMITS = RequestLimits(messages=50, new_tokens=1000)
OPTIONS: dict[str, Any] = {"limits": LIMITS, "append_roles": frozenset(ROLES)}
DOCUMENT = document(version="1", guarded=True, limits=LIMITS)
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]
NAMES = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "allow_header_conformance",
)  # fmt: skip


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., Served]) -> Iterator[Served]:
    """A session server that asks for tokens."""
    with serve(auth="tokens", tokens=(ADMIN,), served_model="tiny", **OPTIONS) as served:
        yield served


@pytest.fixture(scope="module")
def described(guarded: Served) -> Any:
    """What the server says of itself, asked without a token, as schemathesis reads it."""
    answer = httpx.get(f"{guarded.url}/openapi.json", timeout=WAIT, trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["components"] == DOCUMENT["components"]
    return schemathesis.openapi.from_dict(answer.json())


@pytest.fixture
def effort(long: bool) -> settings:
    """How much is tried of one operation."""
    relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(
        max_examples=2000 if long else 12, deadline=None, derandomize=not long, suppress_health_check=relaxed
    )


def cases(described: Any, path: str, method: str) -> st.SearchStrategy[Any]:
    """Requests to one operation, also such as the document does not allow where it can be told from those it does."""
    operation = described[path][method.upper()]
    sound: st.SearchStrategy[Any] = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if "requestBody" not in DOCUMENT["paths"][path][method]:
        return sound
    odd: st.SearchStrategy[Any] = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    return sound | odd


def test_every_route_is_described_and_nothing_else(tiny_dir: Path) -> None:
    app = create_app(SessionConfig(model=str(tiny_dir), upstream="http://x"))
    routes = {
        (re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path), method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert routes == set(OPERATIONS)


def test_every_error_of_ours_is_described() -> None:
    def below(kind: type[SessionError]) -> set[type[SessionError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    told: dict[str, str] = {}
    for path, method in OPERATIONS:
        told |= {code: entry["description"] for code, entry in DOCUMENT["paths"][path][method]["responses"].items()}
    for kind in below(SessionError):
        assert kind.code is not None
        assert kind.code in told[str(kind.status)], kind


def test_without_tokens_none_is_asked_for() -> None:
    open_ = document(version="1", guarded=False, limits=LIMITS)
    assert "securitySchemes" not in open_["components"]
    for methods in open_["paths"].values():
        for operation in methods.values():
            assert "security" not in operation
            assert not {"401", "403"} & set(operation["responses"])


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_whatever_is_asked_is_answered_as_described(
    guarded: Served, described: Any, engine: ScriptedEngine, effort: settings, path: str, method: str
) -> None:
    """Nothing that a client sends is a 5xx, with an engine that does its part."""
    checks = CHECKS.get_by_names(list(NAMES))

    @effort
    @given(cases(described, path, method))
    def asked(case: Any) -> None:
        answer = case.call(base_url=guarded.url, headers={"authorization": f"Bearer {ADMIN}"}, timeout=WAIT)
        assert answer.status_code < 500, answer.text
        case.validate_response(answer, checks=checks)

    asked()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_a_sessions_key_opens_what_is_described(
    guarded: Served, described: Any, engine: ScriptedEngine, effort: settings, path: str, method: str
) -> None:
    with httpx.Client(base_url=guarded.url, timeout=WAIT, trust_env=False) as http:
        bearer = {"authorization": f"Bearer {ADMIN}"}
        mine, other = (http.post("/sessions", headers=bearer).json() for _ in range(2))
    security = DOCUMENT["paths"][path][method]["security"]
    checks = CHECKS.get_by_names(list(NAMES))

    @effort
    @given(cases(described, path, method), st.booleans(), st.sampled_from(["bearer", "header", None]))
    def asked(case: Any, own: bool, how: str | None) -> None:
        if "session_id" in (case.path_parameters or {}):
            case.path_parameters["session_id"] = (mine if own else other)["session_id"]
        case.headers = {n: v for n, v in case.headers.items() if n.lower() not in ("authorization", "x-api-key")}
        key = mine["api_key"]
        token = {"bearer": {"authorization": f"Bearer {key}"}, "header": {"x-api-key": key}}.get(how or "", {})
        answer = case.call(base_url=guarded.url, headers=token, timeout=WAIT)
        if not security or (own and how and {how: ["session"]} in security):
            assert answer.status_code not in (401, 403)
        else:
            assert answer.status_code == (403 if own and how and "session_id" in path else 401)
        case.validate_response(answer, checks=checks)

    asked()
