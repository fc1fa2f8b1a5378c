"""Anthropic's Messages <-> OpenAI chat, as pure functions. Fields taken, refused and ignored: docs/dialects.md.

What a client sends back as history becomes the chat messages that were stored: one assistant message per answer, with
thinking as its `reasoning_content`; a `tool` message per tool result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pacenote.rollout.errors import ContextOverflow, SessionError
from pacenote.rollout.fields import ENGINE_FIELDS, Object, entries, forbid, need, take, text, unserved, wrong
from pacenote.rollout.messages import parse_message

SIGNATURE = "pacenote"
"""Signature of every thinking block; what comes back with it, or with another one, is held against the record."""

_REFUSED = {
    "container": "there are no server tools",
    "mcp_servers": "there are no server tools",
}
_ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    410: "not_found_error", 413: "request_too_large", 422: "invalid_request_error", 429: "rate_limit_error",
    504: "timeout_error",
}  # fmt: skip
_LENGTHS = re.compile(r"\((\d+) tokens\).*?\((\d+) tokens\)")


def chat_request(body: Object, *, counting: bool = False) -> dict[str, Any]:
    """The chat body of a Messages body.

    Args:
        body: parsed JSON.
        counting: it came to count_tokens, where `max_tokens` is not asked for.

    Raises:
        BadRequest: a field that cannot be, or cannot be kept; its path is named.
    """
    forbid(body, _REFUSED)
    _check_edits(body)
    chat = {name: body[name] for name in ("model", *ENGINE_FIELDS) if body.get(name) is not None}
    system = text(body.get("system"), "system", ("text",))
    chat["messages"] = [{"role": "system", "content": system}] if system else []
    listed = entries(need(body, "messages", list), "messages")
    for where, message in listed:
        chat["messages"] += _messages(message, where)
    if listed and listed[-1][1].get("role") == "assistant":
        raise unserved(f"{listed[-1][0]}.role", "assistant", "the last message is answered, not continued (no prefill)")
    if not counting:
        chat["max_tokens"] = need(body, "max_tokens", int)
    stops = take(body, "stop_sequences", list)
    if not all(isinstance(stop, str) for stop in stops or ()):
        raise wrong("stop_sequences", "a list of strings", stops)
    chat |= {"stop": stops} if stops else {}
    tools = [_tool(tool, where) for where, tool in entries(take(body, "tools", list) or [], "tools")]
    chat |= {"tools": tools} if tools else {}
    chat |= _choice(take(body, "tool_choice", dict))
    return chat | _thinking(body, chat) | _output(take(body, "output_config", dict) or {})


def answer(completion: Object, body: Object, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """The Message of a `chat.completion`.

    Args:
        completion: of one choice.
        body: the Messages body that was asked.
        decode: token ids -> text, special tokens included.
    """
    choice, usage = completion["choices"][0], completion["usage"]
    message = parse_message(choice["message"], "the answer")
    blocks: list[dict[str, Any]] = []
    if message.reasoning:
        blocks.append({"type": "thinking", "thinking": message.reasoning, "signature": SIGNATURE})
    if message.plain["content"]:
        blocks.append({"type": "text", "text": message.plain["content"]})
    id = str(completion["id"]).removeprefix("chatcmpl-")
    for place, call in enumerate(message.plain.get("tool_calls", ())):
        said = message.raw["tool_calls"][place]["function"].get("arguments")
        name, arguments = call["function"]["name"], _sendable(call["function"]["arguments"], said)
        blocks.append(
            {"type": "tool_use", "id": call.get("id") or f"toolu_{id}_{place}", "name": name, "input": arguments}
        )
    stop = _stopped(choice, body.get("stop_sequences") or (), decode)
    reasons = {"tool_calls": "tool_use", "length": "max_tokens"}
    return {
        "id": f"msg_{id}",
        "type": "message",
        "role": "assistant",
        "model": completion["model"],
        "content": blocks,
        "stop_reason": "stop_sequence" if stop else reasons.get(choice["finish_reason"], "end_turn"),
        "stop_sequence": stop,
        "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]},
    }


def events(message: Object) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stream of a Message: names and data of its server-sent events, one delta a block."""
    ends = {name: message[name] for name in ("stop_reason", "stop_sequence")}
    start = {**message, "content": [], "usage": {**message["usage"], "output_tokens": 0}} | dict.fromkeys(ends)
    yield "message_start", {"type": "message_start", "message": start}
    for index, block in enumerate(message["content"]):
        empty, deltas = _deltas(block)
        yield "content_block_start", {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield "content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta}
        yield "content_block_stop", {"type": "content_block_stop", "index": index}
    yield "message_delta", {"type": "message_delta", "delta": ends, "usage": message["usage"]}
    yield "message_stop", {"type": "message_stop"}


def error_body(error: SessionError) -> dict[str, Any]:
    """An error in Anthropic's shape. An overflow starts with the words that clients look for."""
    message = str(error)
    if isinstance(error, ContextOverflow):
        found = _LENGTHS.search(message)
        lengths = f"{found[1]} tokens > {found[2]} maximum. " if found else ""
        message = f"prompt is too long: {lengths}{message}"
    kind = _ERRORS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": None}


def _messages(message: Object, where: str) -> list[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise wrong(f"{where}.role", "user, assistant or system", role)
    path = f"{where}.content"
    if role == "system" or isinstance(content, str):
        return [{"role": role, "content": text(content, path, ("text",))}]
    blocks = entries(need(message, "content", list, f"{where}."), path)
    return [_assistant(blocks)] if role == "assistant" else _user(blocks)


def _user(blocks: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The tool and user messages of a user's blocks, in their order; texts that follow each other are one message."""
    messages: list[dict[str, Any]] = []
    for where, block in blocks:
        kind = block.get("type")
        if kind == "text":
            said = need(block, "text", str, f"{where}.")
            if messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += said
            else:
                messages.append({"role": "user", "content": said})
        elif kind == "tool_result":
            result = text(block.get("content"), f"{where}.content", ("text",))
            if take(block, "is_error", bool, f"{where}.") and not result:
                result = "error"  # else nothing would tell the model
            call = need(block, "tool_use_id", str, f"{where}.")
            messages.append({"role": "tool", "tool_call_id": call, "content": result})
        else:
            raise unserved(f"{where}.type", kind, "a user's blocks are text and tool_result; only text is recorded")
    return messages or [{"role": "user", "content": ""}]


def _assistant(blocks: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    said, thought, calls = "", "", []
    for where, block in blocks:
        kind, dot = block.get("type"), f"{where}."
        if kind == "text":
            said += need(block, "text", str, dot)
        elif kind == "thinking":
            thought += need(block, "thinking", str, dot)
        elif kind == "tool_use":
            function = {"name": need(block, "name", str, dot), "arguments": json.dumps(need(block, "input", dict, dot))}
            calls.append({"id": need(block, "id", str, dot), "type": "function", "function": function})
        else:
            raise unserved(f"{where}.type", kind, "an assistant's blocks are text, thinking and tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": said}
    return message | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})


def _tool(tool: Object, where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise unserved(f"{where}.type", tool["type"], "only custom tools are; the model knows no others")
    forbid(tool, {"defer_loading": "there is no tool search"}, f"{where}.")
    function = {"name": need(tool, "name", str, f"{where}.")}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": function | {"parameters": need(tool, "input_schema", dict, f"{where}.")}}


def _choice(choice: Object | None) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = take(choice, "type", str, "tool_choice.")
    plain = {"auto": "auto", "any": "required", "none": "none"}
    chosen: Any = plain.get(kind or "")
    if kind == "tool":
        chosen = {"type": "function", "function": {"name": need(choice, "name", str, "tool_choice.")}}
    if chosen is None:
        raise wrong("tool_choice.type", "auto, any, tool or none", kind)
    alone = take(choice, "disable_parallel_tool_use", bool, "tool_choice.")
    return {"tool_choice": chosen} | ({"parallel_tool_calls": False} if alone else {})


def _thinking(body: Object, chat: Object) -> dict[str, Any]:
    """`thinking`: off is told to the template. On is what a template that can think does; its budget is not kept."""
    thinking = take(body, "thinking", dict)
    if thinking is None or thinking.get("type") in ("enabled", "adaptive"):
        return {}
    if thinking.get("type") != "disabled":
        raise wrong("thinking.type", "enabled, adaptive or disabled", thinking.get("type"))
    return {"chat_template_kwargs": {"enable_thinking": False, **(take(chat, "chat_template_kwargs", dict) or {})}}


def _output(config: Object) -> dict[str, Any]:
    chat: dict[str, Any] = {}
    if effort := take(config, "effort", str, "output_config."):
        chat["reasoning_effort"] = effort
    if form := take(config, "format", dict, "output_config."):
        if form.get("type") != "json_schema":
            raise wrong("output_config.format.type", "json_schema", form.get("type"))
        schema = {"name": "answer", "schema": need(form, "schema", dict, "output_config.format.")}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    return chat


def _check_edits(body: Object) -> None:
    """Refuse edits of the history, but for the one that says to keep everything."""
    management = take(body, "context_management", dict) or {}
    for where, edit in entries(
        take(management, "edits", list, "context_management.") or [], "context_management.edits"
    ):
        if edit.get("keep") != "all" or not str(edit.get("type")).startswith("clear_thinking_"):
            raise unserved(
                where, edit.get("type"), "history is kept as it was sampled; send the messages that you want"
            )


def _sendable(arguments: dict[str, Any], said: object) -> dict[str, Any]:
    """A call's input. Not-a-numbers are no JSON: such arguments are passed on as the text that was written."""
    try:
        json.dumps(arguments, allow_nan=False)
    except ValueError:
        return {"arguments": said if isinstance(said, str) else json.dumps(said)}
    return arguments


def _stopped(choice: Object, stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> str | None:
    """The stop sequence that the last token completed, the one that starts first."""
    if choice["finish_reason"] != "stop" or not stops:
        return None
    ids = choice["token_ids"]
    whole, before = decode(ids), decode(ids[:-1])
    met = [stop for stop in stops if stop in whole and stop not in before]
    return min(met, key=whole.index, default=None)


def _deltas(block: Object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as its stream starts, and its deltas."""
    if block["type"] == "thinking":
        thinking = {"type": "thinking_delta", "thinking": block["thinking"]}
        signature = {"type": "signature_delta", "signature": block["signature"]}
        return {"type": "thinking", "thinking": "", "signature": ""}, [thinking, signature]
    if block["type"] == "text":
        return {"type": "text", "text": ""}, [{"type": "text_delta", "text": block["text"]}]
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
