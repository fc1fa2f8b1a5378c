"""Talking to a session server over HTTP, as tests do it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from pacenote.rollout.samples import decode_samples
from pacenote.rollout.trajectory import Trajectory

Message = dict[str, Any]
WAIT = 30  # seconds after which something that should come is taken not to come
USER = {"role": "user", "content": "a"}
MORE = {"role": "user", "content": "b"}
TOOL = {"role": "tool", "content": "b"}
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]


def start(http: httpx.Client) -> str:
    answer = http.post("/sessions")
    assert answer.status_code == 200
    session: str = answer.json()["session_id"]
    return f"/sessions/{session}"


def chat(http: httpx.Client, session: str, messages: object, **fields: Any) -> httpx.Response:
    return http.post(f"{session}/v1/chat/completions", json={"messages": messages, **fields})


def said(http: httpx.Client, session: str, messages: list[Any], **fields: Any) -> Message:
    """The message of an answer that must come."""
    answer = chat(http, session, messages, **fields)
    assert answer.status_code == 200, answer.text
    message: Message = answer.json()["choices"][0]["message"]
    return message


def records(http: httpx.Client, session: str) -> list[dict[str, Any]]:
    answer = http.get(session)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["records"]
    return found


def samples(http: httpx.Client, session: str, **options: Any) -> list[Trajectory]:
    answer = http.post(f"{session}/samples", json=options)
    assert answer.status_code == 200, answer.text
    return decode_samples(answer.content)


def error(answer: httpx.Response, status: int, code: str) -> str:
    """The message of an error body in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == code
    message: str = body["message"]
    return message


def events(answer: httpx.Response) -> list[Any]:
    """The data of well-formed server-sent events; the last is [DONE]."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, rest = answer.text.split("\n\n")
    assert rest == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextmanager
def left_open(http: httpx.Client, session: str, body: Message, *, key: str = "") -> Iterator[None]:
    """A client that has asked and waits; leaving the block closes its connection."""
    data = json.dumps(body).encode()
    headers = f"host: x\r\ncontent-length: {len(data)}\r\n" + (f"idempotency-key: {key}\r\n" if key else "")
    head = f"POST {session}/v1/chat/completions HTTP/1.1\r\n{headers}\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as client:
        client.sendall(head.encode() + data)
        yield
