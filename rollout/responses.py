"""OpenAI's Responses <-> OpenAI chat, as pure functions. Fields taken, refused and ignored: docs/dialects.md.

The items of one answer (reasoning, message, function calls, in this order) become one assistant message again when they
come back as input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pacenote.rollout.errors import SessionError
from pacenote.rollout.fields import ENGINE_FIELDS, Object, entries, forbid, need, take, text, unserved, wrong
from pacenote.rollout.messages import parse_message

_KEEP = "send the whole history as input"
_REFUSED = {
    "background": "an answer is sent when it is ready, and kept nowhere else",
    "context_management": f"history is kept as it was sampled; {_KEEP}",
    "conversation": f"responses cannot be looked up; {_KEEP}",
    "moderation": "nothing moderates here",
    "previous_response_id": f"responses cannot be looked up; {_KEEP}",
    "prompt": "there are no stored prompts",
    "store": f"responses cannot be looked up; {_KEEP} and leave store out or false",
    "top_logprobs": "logprobs are of all tokens sampled, thinking included; use chat/completions or the samples",
}
_TEXTS = ("input_text", "output_text", "text")
_ECHOED: dict[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "reasoning": None,
    "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None,
}  # fmt: skip


def chat_request(body: Object) -> dict[str, Any]:
    """The chat body of a Responses body.

    Raises:
        BadRequest: a field that cannot be, or cannot be kept; its path is named.
    """
    forbid(body, _REFUSED)
    if body.get("truncation") not in (None, "disabled"):
        raise unserved("truncation", body["truncation"], "history is kept as it was sampled")
    for place, name in enumerate(take(body, "include", list) or []):
        if name != "reasoning.encrypted_content":
            raise unserved(f"include[{place}]", name, "an answer has nothing else to include")
    chat = {name: body[name] for name in ("model", "stop", *ENGINE_FIELDS) if body.get(name) is not None}
    instructions = take(body, "instructions", str)
    first = [{"role": "system", "content": instructions}] if instructions else []
    chat["messages"] = first + _messages(body.get("input"))
    most = take(body, "max_output_tokens", int)
    chat |= {} if most is None else {"max_tokens": most}
    tools = [_tool(tool, where) for where, tool in entries(take(body, "tools", list) or [], "tools")]
    chat |= {"tools": tools} if tools else {}
    parallel = take(body, "parallel_tool_calls", bool)
    chat |= {} if parallel is None else {"parallel_tool_calls": parallel}
    effort = take(take(body, "reasoning", dict) or {}, "effort", str, "reasoning.")
    chat |= {"reasoning_effort": effort} if effort else {}
    return chat | _choice(body.get("tool_choice")) | _format(take(body, "text", dict) or {})


def answer(completion: Object, body: Object) -> dict[str, Any]:
    """The Response of a `chat.completion`.

    Args:
        completion: of one choice.
        body: the Responses body that was asked; some of its fields are said again.
    """
    choice, usage = completion["choices"][0], completion["usage"]
    cut = choice["finish_reason"] == "length"
    id = str(completion["id"]).removeprefix("chatcmpl-")
    given = {name: other if body.get(name) is None else body[name] for name, other in _ECHOED.items()}
    return {
        "id": f"resp_{id}",
        "object": "response",
        "created_at": completion["created"],
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "model": completion["model"],
        "output": _items(choice["message"], id, "incomplete" if cut else "completed"),
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
        "background": False,
        "previous_response_id": None,
        "store": False,
        "truncation": "disabled",
        **given,
    }


def events(response: Object) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stream of a Response: names and data of its server-sent events, numbered, one delta a part."""
    for number, (name, data) in enumerate(_events(response)):
        yield name, {"type": name, "sequence_number": number, **data}


def error_body(error: SessionError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return error.body()


def _messages(value: object) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise wrong("input", "a string or a list of items that is not empty", value)
    messages: list[dict[str, Any]] = []
    ready = 0  # how far the newest assistant message is: 1 thought, 2 said something, 3 called
    for where, item in entries(value, "input"):
        kind = item.get("type") or "message"
        if kind == "function_call_output":
            messages.append(_output(item, where))
            ready = 0
        elif kind == "message" and item.get("role") != "assistant":
            messages.append(_other(item, where))
            ready = 0
        else:
            stage, part = _part(item, kind, where)
            if stage < ready or stage == ready != 3 or not ready:
                messages.append({"role": "assistant", "content": ""})
            calls = [*messages[-1].get("tool_calls", ()), *part.get("tool_calls", ())]
            messages[-1] |= part | ({"tool_calls": calls} if calls else {})
            ready = stage
    return messages


def _part(item: Object, kind: object, where: str) -> tuple[int, dict[str, Any]]:
    """(stage, fields) that an item of an answer brings to its assistant message."""
    dot = f"{where}."
    if kind == "reasoning":
        thought = text(take(item, "content", list, dot), f"{where}.content", ("reasoning_text",))
        return 1, {"reasoning_content": thought} if thought else {}
    if kind == "message":
        return 2, {"content": text(item.get("content"), f"{where}.content", _TEXTS)}
    if kind == "function_call":
        function = {"name": need(item, "name", str, dot), "arguments": need(item, "arguments", str, dot)}
        call = {"id": need(item, "call_id", str, dot), "type": "function", "function": function}
        return 3, {"tool_calls": [call]}
    reason = "items are message, reasoning, function_call and function_call_output"
    raise unserved(f"{where}.type", kind, reason)


def _other(item: Object, where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "system", "developer"):
        raise wrong(f"{where}.role", "user, assistant, system or developer", role)
    content = text(item.get("content"), f"{where}.content", _TEXTS)
    return {"role": "user" if role == "user" else "system", "content": content}


def _output(item: Object, where: str) -> dict[str, Any]:
    call = need(item, "call_id", str, f"{where}.")
    return {"role": "tool", "tool_call_id": call, "content": text(item.get("output"), f"{where}.output", _TEXTS)}


def _tool(tool: Object, where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise unserved(f"{where}.type", tool.get("type"), "only function tools are; there are no server tools")
    forbid(tool, {"defer_loading": "there is no tool search"}, f"{where}.")
    function = {"name": need(tool, "name", str, f"{where}.")}
    known = ("description", "parameters", "strict")
    return {
        "type": "function",
        "function": function | {name: tool[name] for name in known if tool.get(name) is not None},
    }


def _choice(choice: object) -> dict[str, Any]:
    if choice is None:
        return {}
    if isinstance(choice, dict) and choice.get("type") == "function":
        named = {"name": need(choice, "name", str, "tool_choice.")}
        return {"tool_choice": {"type": "function", "function": named}}
    if choice not in ("auto", "none", "required"):
        raise wrong("tool_choice", "auto, none, required or a function", choice)
    return {"tool_choice": choice}


def _format(config: Object) -> dict[str, Any]:
    form = take(config, "format", dict, "text.") or {"type": "text"}
    if form.get("type") == "json_object":
        return {"response_format": {"type": "json_object"}}
    if form.get("type") == "json_schema":
        schema = {name: form[name] for name in ("description", "strict") if form.get(name) is not None}
        schema |= {
            "name": need(form, "name", str, "text.format."),
            "schema": need(form, "schema", dict, "text.format."),
        }
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    if form.get("type") != "text":
        raise wrong("text.format.type", "text, json_object or json_schema", form.get("type"))
    return {}


def _items(said: Object, id: str, status: str) -> list[dict[str, Any]]:
    """Output items of an assistant message. One without calls has a message item even if nothing was said."""
    message, items = parse_message(said, "the answer"), list[dict[str, Any]]()
    calls, content = message.raw.get("tool_calls") or (), message.plain["content"]
    if message.reasoning:
        thought = {"type": "reasoning_text", "text": message.reasoning}
        items.append({"type": "reasoning", "id": f"rs_{id}", "summary": [], "content": [thought]})
    if content or not calls:
        part = {"type": "output_text", "text": content, "annotations": [], "logprobs": []}
        items.append({"type": "message", "id": f"msg_{id}", "role": "assistant", "content": [part]})
    for place, call in enumerate(calls):
        names = {"id": f"fc_{id}_{place}", "call_id": call.get("id") or f"call_{id}_{place}"}
        function = call["function"]
        items.append(
            {"type": "function_call", "name": function["name"], "arguments": function.get("arguments") or "{}"} | names
        )
    return [item | {"status": "completed"} for item in items[:-1]] + [items[-1] | {"status": status}]


def _events(response: Object) -> Iterator[tuple[str, dict[str, Any]]]:
    begun = {**response, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    for place, item in enumerate(response["output"]):
        at = {"output_index": place}
        bare: dict[str, Any] = {"arguments": ""} if "arguments" in item else {"content": []}
        yield "response.output_item.added", at | {"item": item | bare | {"status": "in_progress"}}
        name, where = "response.function_call_arguments", {"item_id": item["id"], "output_index": place}
        if "arguments" in item:
            yield f"{name}.delta", where | {"delta": item["arguments"]}
            yield f"{name}.done", where | {"name": item["name"], "arguments": item["arguments"]}
        for index, part in enumerate(item.get("content", ())):
            yield from _part_events(part, where | {"content_index": index})
        yield "response.output_item.done", at | {"item": item}
    yield f"response.{response['status']}", {"response": response}


def _part_events(part: dict[str, Any], where: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = f"response.{part['type']}"
    extra: dict[str, Any] = {"logprobs": []} if "logprobs" in part else {}
    yield "response.content_part.added", where | {"part": part | {"text": ""}}
    yield f"{name}.delta", where | extra | {"delta": part["text"]}
    yield f"{name}.done", where | extra | {"text": part["text"]}
    yield "response.content_part.done", where | {"part": part}
