"""The parsers that read what a client, an engine or a disk says: each raises what it documents, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import httptools
import httpx
import numpy as np
from safetensors import SafetensorError

from pacenote.replay.errors import PayloadError
from pacenote.replay.record import PREFILL
from pacenote.replay.vllm import decode_vllm
from pacenote.replay.wire import decode_sglang
from pacenote.rollout import anthropic, front, gate, responses
from pacenote.rollout.agent_posts import AGENT_POSTS, agent_body
from pacenote.rollout.chat import Chats
from pacenote.rollout.completion import Completion
from pacenote.rollout.errors import BadRequest, ContextOverflow, Forbidden, SessionError, UpstreamError
from pacenote.rollout.journal_entry import pack_turn, unpack_turn
from pacenote.rollout.memory_store import MemoryStore
from pacenote.rollout.messages import ROLES, parse_messages
from pacenote.rollout.proxy import check_path
from pacenote.rollout.request_limits import USUAL
from pacenote.rollout.samples import decode_samples, encode_samples
from pacenote.rollout.session import Pending
from pacenote.rollout.sglang import Engine, read_reply, refusal
from pacenote.rollout.template import Template
from pacenote.rollout.toolcalls import parse_tool_calls, split_reasoning
from tests.rollout.conftest import GEOMETRY, Player, payload, sglang_answer

Run = Callable[[bytes], None]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string"}, "y": {"type": ["string", "null"]}},
            },
        },
    }
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "1"}'}}
USER = {"role": "user", "content": "a"}
SAID = {"role": "assistant", "content": "ok", "reasoning_content": "so", "tool_calls": [CALL]}
TOOL = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "b"}]}
PATHS = ("metrics", "v1/tokenize", "v1/models/a", "../x", "//x", "a@b:1", "http://x/y", "flush_cache", "v1/completions")
HEADS = (
    b"GET /sessions/a/v1/models HTTP/1.1\r\nHost: x",
    b"POST http://x:1/sessions/a%2Fb?c=d HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked",
    b"GET //sessions/%ff/../b HTTP/1.0\r\nConnection: keep-alive, x\r\n upgrade: y",
    b"OPTIONS * HTTP/1.1\r\nHost: x",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nUpgrade: h2c",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One parser.

    Attributes:
        name: on the command line.
        seeds: what it reads on a good day.
        start: makes what runs one input; called in the process that runs it.
        json: where JSON stands in an input: None: nowhere; 0: all of it; n: after its length in n bytes.
    """

    name: str
    seeds: Sequence[bytes]
    start: Callable[[], Run]
    json: int | None = None


def targets(model: str) -> list[Target]:
    """All of them.

    Args:
        model: directory of the tiny model.
    """
    template = Template.load(model, append_roles=ROLES)
    player = Player(template)
    for message in ({"content": "ok"}, {"content": "x", "reasoning_content": "so", "tool_calls": [CALL]}):
        player.ask([USER], stop="user", message=message, request={"tools": TOOLS})
    replies = [_reply(player, **fields) for fields in _REPLIES]
    entries = [_entry(player, number) for number in range(2)]
    samples = [encode_samples(player.session.trajectories(include_superseded=on)) for on in (False, True)]
    player.close()
    chats = [
        {"messages": [USER], "tools": TOOLS, "n": 2, "seed": 1, "chat_template_kwargs": {"x": 1}},
        {"messages": [{"role": "system", "content": None}, USER, SAID, TOOL], "stream": True, "max_tokens": 4},
    ]
    return [
        Target(name="chat", seeds=_dumped(chats), start=lambda: _chat(template), json=0),
        Target(name="anthropic", seeds=_dumped(_ANTHROPIC), start=lambda: _dialect(anthropic.chat_request), json=0),
        Target(name="responses", seeds=_dumped(_RESPONSES), start=lambda: _dialect(responses.chat_request), json=0),
        Target(name="post", seeds=_dumped(_POSTS), start=lambda: _post, json=0),
        Target(name="reply", seeds=_dumped(replies), start=lambda: _read_reply(player, template), json=0),
        Target(name="wire", seeds=_rows(), start=lambda: _wire),
        Target(name="samples", seeds=samples, start=lambda: _samples, json=8),
        Target(name="journal", seeds=entries, start=lambda: _journal(player), json=4),
        Target(name="head", seeds=HEADS, start=lambda: _head),
        Target(name="calls", seeds=_TEXTS, start=lambda: _calls),
        Target(name="path", seeds=[path.encode() for path in PATHS], start=lambda: _path),
    ]


def _dumped(bodies: Sequence[Any]) -> list[bytes]:
    return [json.dumps(body).encode() for body in bodies]


_ANTHROPIC: list[dict[str, Any]] = [
    {
        "model": "m", "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"], "top_k": 1,
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "so", "signature": "pacenote"}, {"type": "text", "text": "ok"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"x": "1"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": "b", "is_error": True},
                {"type": "text", "text": "more"},
            ]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "tool", "name": "f"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
        "thinking": {"type": "disabled"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    },
]  # fmt: skip
_RESPONSES: list[dict[str, Any]] = [
    {"input": "a", "instructions": "s", "max_output_tokens": 4, "reasoning": {"effort": "low"}, "store": False},
    {
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "b"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "tool_choice": {"type": "function", "name": "f"}, "include": ["reasoning.encrypted_content"],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
    },
]  # fmt: skip
_POSTS = [{"prompt": ["a"]}, {"tokens": [[1]]}, {"input": "a"}, {"query": "a", "documents": ["b"], "top_n": 1}]
_REPLIES: list[dict[str, Any]] = [
    {},
    {"matched": 41, "message": {"content": None, "tool_calls": [CALL]}},
    {"message": {"content": "<think>x", "reasoning_content": "y"}, "cached_tokens": 1, "num_retractions": 1,
     "weight_versions": [{"version": "0", "start": 0, "end": 1}, {"version": "1", "start": 1, "end": 2}]},
]  # fmt: skip
_TEXTS = [
    b"so</think>ok<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>",
    b"<think>a<tool_call>f\n<arg_key>y</arg_key>\n<arg_value>null</arg_value><arg_key>z</arg_key><arg_value>[1e999]"
    b"</arg_value></tool_call>b<tool_call>g</tool_call>",
]


def _reply(player: Player, **fields: Any) -> dict[str, Any]:
    ids = player.session.turns[0].prompt.token_ids().tolist()
    body = {"input_ids": ids, "return_routed_experts": True, "routed_experts_start_len": 0}
    return sglang_answer(body, [40, 41], **fields)


def _entry(player: Player, number: int) -> bytes:
    turn = player.session.turns[number]
    head, arrays = pack_turn(Pending(prompt=turn.prompt, rivals=()), turn.answer, id=turn.id, created=turn.created)
    return len(head.encode()).to_bytes(4, "little") + head.encode() + arrays


def _rows() -> list[bytes]:
    return [payload([1, 2, 3]).encode(), b"k05VTVBZAQB2AHsnZGVzY3InOiAnPGk0JywgJ2ZvcnRyYW5fb3JkZXInOiBGYWxzZX0="]


def _chat(template: Template) -> Run:
    """A client's body up to what the engine would be sent."""
    runner, threads = asyncio.Runner(), ThreadPoolExecutor(1)
    chats = Chats(
        template=template,
        geometry=GEOMETRY,
        append_roles=frozenset(ROLES),
        model="m",
        store=MemoryStore(),
        engine=Engine("http://127.0.0.1:1", timeout=1.0),
        threads=threads,
    )

    def run(data: bytes) -> None:
        try:
            body = front._parsed(data, USUAL)
            front._streaming(body)
            USUAL.check_messages(body)
            assert runner.run(chats.count("s", USUAL.budgeted(body))) > 0
        except BadRequest:
            pass

    return run


def _dialect(translate: Callable[[Any], dict[str, Any]]) -> Run:
    def run(data: bytes) -> None:
        try:
            USUAL.check_depth(data)
            body = json.loads(data.decode())
        except (ValueError, BadRequest, RecursionError):
            return
        with contextlib.suppress(BadRequest):
            if isinstance(body, dict):
                parse_messages(translate(body)["messages"])

    return run


def _post(data: bytes) -> None:
    for path, fields in AGENT_POSTS.items():
        try:
            USUAL.check_depth(data)
            sent = json.loads(agent_body(path, data))
        except (BadRequest, Forbidden):
            continue
        assert set(sent) <= set(fields)
        assert not [value for value in sent.values() if isinstance(value, dict)]


def _read_reply(player: Player, template: Template) -> Run:
    """An engine's answer up to what each dialect's client would get: once it is recorded, nothing may fail."""
    prompt = player.session.turns[0].prompt

    def run(data: bytes) -> None:
        for status in (400, 500):
            assert isinstance(refusal(status, data), SessionError)
        try:
            reply = read_reply(data, prompt, GEOMETRY)
            body = Completion.of([reply], id="i", created=1.0, model="m", prompt_ids=prompt.token_ids()).body()
        except (UpstreamError, ContextOverflow):
            return
        for event in anthropic.events(anthropic.answer(body, {"stop_sequences": ["x"]}, template.decode)):
            json.dumps(event)
        for event in responses.events(responses.answer(body, {})):
            json.dumps(event)

    return run


def _wire(data: bytes) -> None:
    for decode in (decode_sglang, decode_vllm):
        for text in (data.decode("latin-1"), data):
            try:
                record = decode(text, GEOMETRY, rows=3, provenance=PREFILL, version=0)
            except PayloadError:
                continue
            assert record.rows == 3
            assert int(record.experts.max(initial=0)) < GEOMETRY.num_experts


def _samples(data: bytes) -> None:
    try:
        for trajectory in decode_samples(data):
            assert trajectory.tokens.dtype == np.int32
    except ValueError:
        pass


def _journal(player: Player) -> Run:
    turns = player.session.turns[:1]

    def run(data: bytes) -> None:
        end = 4 + int.from_bytes(data[:4], "little")
        with contextlib.suppress(BadRequest, KeyError, IndexError, TypeError, ValueError, SafetensorError):
            unpack_turn(data[4:end].decode(errors="replace"), data[end:], turns)

    return run


class _Reader:
    """What a process makes of a head."""

    def __init__(self) -> None:
        self.url, self.done = b"", 0

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_headers_complete(self) -> None:
        self.done += 1


def _head(data: bytes) -> None:
    """Gate and process read the same path, and one request."""
    head = data.split(b"\r\n\r\n")[0] + b"\r\n\r\n"
    try:
        path, sent = gate.read_head(head)
    except gate._Refusal:
        return
    assert sent.endswith(b"\r\nconnection: close\r\n\r\n")
    reader = _Reader()
    try:
        httptools.HttpRequestParser(reader).feed_data(sent)
        theirs = unquote((httptools.parse_url(reader.url).path or b"").decode("ascii"))
    except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError):
        return
    assert theirs == path
    assert reader.done == 1


def _calls(data: bytes) -> None:
    text = data.decode(errors="replace")
    for opened in (False, True):
        _, content = split_reasoning(text, opened=opened)
        for call in parse_tool_calls(content, TOOLS).tool_calls:
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
            call["function"]["arguments"].encode()


def _path(data: bytes) -> None:
    try:
        path = check_path(data.decode(errors="replace"))
    except (BadRequest, Forbidden):
        return
    url = httpx.URL("http://engine:1/base").copy_with(raw_path=f"/base/{path}".encode())
    assert (url.host, url.port, url.path, url.query) == ("engine", 1, f"/base/{path}", b"")
