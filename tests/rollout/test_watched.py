"""What an operator sees: metrics, logs, spans, and a server that ends without cutting answers off."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response

from pacenote.rollout import request_log
from pacenote.rollout.launch import Service, free_port, sessions_command
from pacenote.rollout.messages import ROLES
from pacenote.rollout.metrics import add_up
from tests.rollout.talk import MORE, USER, WAIT, chat, error, said, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def metrics(client: httpx.Client) -> Samples:
    """Values by name and labels."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"pacenote_{name}", tuple(sorted(labels.items()))), 0.0)


@pytest.fixture
def http(serve: Callable[..., Served], engine: ScriptedEngine) -> Iterator[httpx.Client]:
    """A client of a server that nobody has used."""
    with serve(append_roles=frozenset(ROLES)) as served, client_of(served) as client:
        yield client


def client_of(served: Served) -> httpx.Client:
    return httpx.Client(base_url=served.url, trust_env=False, timeout=WAIT)


def test_metrics_count_what_happens(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    first = said(http, session, [USER])
    said(http, session, [USER, first, MORE])
    error(chat(http, session, []), 400, "bad_request")
    engine.write = lambda _: Response(b"boom", 500)
    error(chat(http, session, [USER]), 502, "upstream_error")
    engine.write = None
    seen = metrics(http)
    assert value(seen, "turns_total", finish="stop") + value(seen, "turns_total", finish="length") == 2
    turns = http.get(session).json()["metadata"]["accumulated_token_ids"]
    generated = value(seen, "tokens_total", kind="generated")
    assert 0 < generated < len(turns)
    assert value(seen, "tokens_total", kind="prompt") > generated
    assert value(seen, "rows_total") > 0
    assert value(seen, "rows_missing_total") == 0
    assert value(seen, "errors_total", status="400", code="bad_request") == 1
    assert sum(v for (name, _), v in seen.items() if name == "pacenote_errors_total") == 2
    assert value(seen, "sessions") == 1
    assert value(seen, "in_flight") == 0
    for name in ("own_seconds", "engine_seconds"):
        assert value(seen, f"{name}_count") == 2
        assert 0 < value(seen, f"{name}_sum") < 60


def test_metrics_of_processes_add_up() -> None:
    def text(turns: int, created: float) -> bytes:
        head = "# HELP pacenote_turns_total x\n# TYPE pacenote_turns_total counter\n"
        label = '{finish="stop"}'
        return f"{head}pacenote_turns_total{label} {turns}\npacenote_turns_created{label} {created}\n".encode()

    both = add_up([text(3, 9.0), text(4, 5.0)]).decode()
    assert 'pacenote_turns_total{finish="stop"} 7.0' in both
    assert add_up([]) == b""


# --- logs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What the log says, as JSON."""
    kept: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(json.loads(request_log.Lines(json=True).format(record)))

    handler, level = Keep(), request_log.log.level
    request_log.log.addHandler(handler)
    request_log.log.setLevel(logging.INFO)
    yield kept
    request_log.log.removeHandler(handler)
    request_log.log.setLevel(level)


def test_lines_have_ids_and_no_content(http: httpx.Client, lines: list[dict[str, Any]]) -> None:
    session = start(http)
    body = {"messages": [{"role": "user", "content": "a secret word"}]}
    answer = http.post(f"{session}/v1/chat/completions", json=body, headers={"x-request-id": "abc.1"})
    assert answer.headers["x-request-id"] == "abc.1"
    deadline = time.monotonic() + 5
    while len(lines) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    created, said_, asked = lines
    name = session.rpartition("/")[2]
    assert (created["event"], created["method"], created["path"], created["status"]) == (
        "request", "POST", "/sessions", 200,
    )  # fmt: skip
    assert (said_["event"], said_["request_id"], said_["session_id"]) == ("chat", "abc.1", name)
    assert said_["prompt_tokens"] > 0
    assert said_["turns"] == [0]
    assert (asked["request_id"], asked["session_id"], asked["status"]) == ("abc.1", name, 200)
    assert "secret" not in json.dumps(lines)
    drawn = http.get("/health", headers={"x-request-id": "two words"}).headers["x-request-id"]
    assert len(drawn) == 32, "an id that could forge a line is not taken"


def test_content_only_if_asked(
    serve: Callable[..., Served], engine: ScriptedEngine, lines: list[dict[str, Any]]
) -> None:
    with serve(log_content=True) as served, client_of(served) as client:
        chat(client, start(client), [{"role": "user", "content": "a secret word"}])
    [line] = [line for line in lines if line["event"] == "chat"]
    assert line["appended"] == [{"role": "user", "content": "a secret word"}]
    assert line["answers"][0]["role"] == "assistant"


def test_a_path_forges_no_line(http: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever chooses a path or an id chooses no other field, and no line."""
    request_log.configure("text")
    try:
        http.get("/sessions/a%0Atime=now event=chat/x%20status=200%20y%22/z")
    finally:
        request_log.configure("off")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "event=" in line]
    assert 'session_id="a\\ntime=now event=chat"' in line
    assert re.findall(r" (\w+)=", re.sub(r'"(\\.|[^"\\])*"', '""', line))[-4:] == ["method", "path", "status", "ms"]


@pytest.mark.parametrize("kind", ["text", "json"])
def test_lines_of_a_process(kind: str, tmp_path: Path) -> None:
    code = (
        "import logging; from pacenote.rollout import request_log\n"
        f"request_log.configure({kind!r})\n"
        "request_log.log.info('request', extra={'fields': {'status': 200}})\n"
        "logging.getLogger('other').warning('odd')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stderr.splitlines()
    if kind == "json":
        assert json.loads(first)["status"] == 200
        assert json.loads(second)["logger"] == "other"
    else:
        assert first.endswith("event=request status=200")
        assert "level=warning event=odd logger=other" in second


# --- spans -----------------------------------------------------------------------------------------------------------


def test_spans(http: httpx.Client, engine: ScriptedEngine) -> None:
    """A chat's parts under one span, in the client's trace, which the engine is told."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    session, theirs = start(http), "0af7651916cd43dd8448eb211c80319c"
    http.post(
        f"{session}/v1/chat/completions",
        json={"messages": [USER]},
        headers={"traceparent": f"00-{theirs}-b7ad6b7169203331-01", "x-request-id": "r1"},
    ).raise_for_status()
    spans = {span.name: span for span in kept.get_finished_spans()}
    assert set(spans) == {f"pacenote.{name}" for name in ("chat", "render", "engine", "commit")}
    assert {f"{span.context.trace_id:032x}" for span in spans.values() if span.context} == {theirs}
    parent = spans["pacenote.chat"].context
    assert all(s.parent == parent for name, s in spans.items() if name != "pacenote.chat")
    told = engine.headers[-1]
    assert told["traceparent"].startswith(f"00-{theirs}-")
    assert told["x-request-id"] == "r1"


# --- the end ---------------------------------------------------------------------------------------------------------


def service(tiny_dir: Path, engine: ScriptedEngine, tmp_path: Path, *flags: str) -> Service:
    port = free_port()
    command = sessions_command(tiny_dir, upstream=engine.url, port=port, extra=["--no-probe", *flags])
    return Service("sessions", command, url=f"http://127.0.0.1:{port}", log=tmp_path / "log")


def ends(server: Service) -> float:
    """Seconds until it has ended after SIGTERM, with exit code 0."""
    began = time.monotonic()
    while server.alive:
        assert time.monotonic() < began + WAIT
        time.sleep(0.02)
    assert server.exit_code == 0
    return time.monotonic() - began


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_in_flight_ends_after_sigterm(
    tiny_dir: Path, engine: ScriptedEngine, tmp_path: Path, workers: int, pool: ThreadPoolExecutor
) -> None:
    with service(tiny_dir, engine, tmp_path, "--workers", str(workers), "--log", "json") as server:
        server.wait_healthy()
        with httpx.Client(base_url=server.url, trust_env=False, timeout=WAIT) as http:
            for _ in range(4):
                said(http, start(http), [USER])
            assert value(metrics(http), "sessions") == 4, "those of all processes"
            session = start(http)
            engine.reset()
            engine.hold()
            answer = pool.submit(chat, http, session, [USER])
            assert engine.arrived.acquire(timeout=WAIT)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGTERM)
            with suppress(httpx.ConnectError):  # soon nobody new is let in
                for _ in range(100):
                    httpx.get(f"{server.url}/health", trust_env=False, timeout=WAIT)
                    time.sleep(0.05)
                pytest.fail("the port is still open")
            engine.release()
            assert answer.result(WAIT).status_code == 200
        ends(server)
    events = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert sum(event["event"] == "chat" for event in events) == 5


def test_what_takes_longer_than_the_drain_is_cut(
    tiny_dir: Path, engine: ScriptedEngine, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with service(tiny_dir, engine, tmp_path, "--drain", "0.2") as server:
        server.wait_healthy()
        with httpx.Client(base_url=server.url, trust_env=False, timeout=WAIT) as http:
            engine.hold()
            pool.submit(chat, http, start(http), [USER])
            assert engine.arrived.acquire(timeout=WAIT)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGTERM)
            assert ends(server) < WAIT / 2
        assert engine.aborted.acquire(timeout=WAIT)
        engine.release()
