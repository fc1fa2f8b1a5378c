"""JSON schemas of the session server's bodies, for its OpenAPI document. What a chat sends on to the engine is not
described further than this server looks at it.
"""

from __future__ import annotations

from typing import Any

from pacenote.rollout.messages import ROLES
from pacenote.rollout.request_limits import RequestLimits

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}


def ref(name: str) -> Schema:
    """A schema of `schemas` by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def obj(required: dict[str, Schema], optional: dict[str, Schema] | None = None, about: str = "") -> Schema:
    """An object that may have further fields."""
    schema: Schema = {"type": "object", "properties": required | (optional or {})}
    return schema | ({"required": [*required]} if required else {}) | ({"description": about} if about else {})


def array(items: Schema, **more: Any) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **more}


def null(schema: Schema) -> Schema:
    """The same, or null."""
    if set(schema) == {"type"}:
        return {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def schemas(limits: RequestLimits) -> dict[str, Schema]:
    """All of them, by name."""
    return _errors() | _requests(limits) | _answers() | _listings()


def _errors() -> dict[str, Schema]:
    inner = {"message": TEXT, "type": TEXT, "param": null(TEXT), "code": null(TEXT)}
    anthropic = {"type": {"const": "error"}, "error": obj({"type": TEXT, "message": TEXT}), "request_id": null(TEXT)}
    return {"Error": obj({"error": obj(inner)}), "AnthropicError": obj(anthropic)}


def _requests(limits: RequestLimits) -> dict[str, Schema]:
    part = obj({"type": {"const": "text"}, "text": TEXT})
    content = {"anyOf": [TEXT, {"type": "null"}, array(ref("TextPart"))]}
    call = obj(
        {"function": obj({"name": TEXT}, {"arguments": null(TEXT)})}, {"id": null(TEXT), "type": {"const": "function"}}
    )
    tool = obj({"type": {"const": "function"}, "function": obj({"name": TEXT}, {"parameters": {"type": "object"}})})
    most = {"maxItems": limits.messages}
    budget: Schema = {"type": "integer", "minimum": 1}
    if limits.new_tokens is not None:
        budget["maximum"] = limits.new_tokens
    message = obj(
        {"role": {"enum": [*ROLES]}},
        {
            "content": content,
            "reasoning_content": null(TEXT),
            "tool_calls": null(array(ref("ToolCall"))),
            "tool_call_id": null(TEXT),
            "name": null(TEXT),
        },
    )
    chat = obj(
        {"messages": array(ref("ChatMessage"), minItems=1, **most)},
        {
            "model": null(TEXT),
            "tools": null(array(ref("Tool"))),
            "n": null({"type": "integer", "minimum": 1, "maximum": 128}),
            "stream": null(FLAG),
            "stream_options": null(obj({}, {"include_usage": FLAG})),
            "max_tokens": null(budget),
            "max_completion_tokens": null(budget),
            "temperature": null(NUMBER),
            "top_p": null(NUMBER),
            "seed": null({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}),
            "stop": {"anyOf": [TEXT, {"type": "null"}, array(TEXT)]},
            "chat_template_kwargs": null({"type": "object"}),
        },
        "OpenAI's chat completions. Fields that are not the client's to set (input_ids, logprobs, meta info, routed "
        "experts, weight versions) are dropped, as is every field that the server does not know.",
    )
    anthropic = obj(
        {"messages": array(obj({"role": {"enum": ["user", "assistant"]}, "content": _blocks()}), minItems=1)},
        {
            "model": null(TEXT),
            "system": {"anyOf": [TEXT, array(ref("TextPart"))]},
            "max_tokens": budget,
            "stream": FLAG,
            "stop_sequences": array(TEXT),
            "tools": array(obj({"name": TEXT, "input_schema": {"type": "object"}}, {"description": TEXT})),
        },
        "Anthropic's Messages. max_tokens must be there, but not to count.",
    )
    item = obj({"role": {"enum": ["user", "assistant", "system", "developer"]}, "content": _parts()})
    responses = obj(
        {"input": {"anyOf": [TEXT, array({"anyOf": [item, ref("ResponseItem")]}, minItems=1)]}},
        {"model": null(TEXT), "instructions": null(TEXT), "max_output_tokens": null(budget), "stream": null(FLAG)},
        "OpenAI's Responses. Nothing is looked up: the whole history is sent.",
    )
    function = {"type": {"const": "function_call"}, "call_id": TEXT, "name": TEXT, "arguments": TEXT}
    output = {"type": {"const": "function_call_output"}, "call_id": TEXT, "output": _parts()}
    return {
        "TextPart": part,
        "ToolCall": call,
        "Tool": tool,
        "ChatMessage": message,
        "ChatRequest": chat,
        "MessagesRequest": anthropic,
        "ResponsesRequest": responses,
        "ResponseItem": {"anyOf": [obj(function), obj(output)]},
        "SamplesRequest": obj({}, {"include_superseded": FLAG}),
    }


def _blocks() -> Schema:
    return {"anyOf": [TEXT, array(ref("TextPart"), minItems=1)]}


def _parts() -> Schema:
    return {"anyOf": [TEXT, array(obj({"type": {"enum": ["input_text", "output_text", "text"]}, "text": TEXT}))]}


def _answers() -> dict[str, Schema]:
    message = obj({"role": {"const": "assistant"}, "content": null(TEXT), "reasoning_content": null(TEXT)})
    choice = {
        "index": COUNT,
        "message": message,
        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
        "logprobs": ANY,
        "token_ids": array(COUNT, minItems=1),
        "prompt_token_ids": array(COUNT, minItems=1),
    }
    usage = obj({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
    head: dict[str, Schema] = {"id": TEXT, "object": {"const": "chat.completion"}, "created": COUNT, "model": TEXT}
    spent = obj({"input_tokens": COUNT, "output_tokens": COUNT})
    answer: dict[str, Schema] = {
        "id": TEXT,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": TEXT,
        "content": array(obj({"type": {"enum": ["text", "thinking", "tool_use"]}})),
        "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        "stop_sequence": null(TEXT),
        "usage": spent,
    }
    response: dict[str, Schema] = {
        "id": TEXT,
        "object": {"const": "response"},
        "created_at": COUNT,
        "status": {"enum": ["completed", "incomplete"]},
        "model": TEXT,
        "output": array(obj({"type": {"enum": ["reasoning", "message", "function_call"]}, "id": TEXT}), minItems=1),
        "usage": spent,
    }
    return {
        "Completion": obj(
            {**head, "choices": array(obj(choice), minItems=1), "usage": usage, "prompt_token_ids": array(COUNT)}
        ),
        "AnthropicMessage": obj(answer),
        "Event": obj({"data": TEXT}, {"event": TEXT}, "One of the server-sent events of a stream; data is JSON."),
        "Counted": obj({"input_tokens": COUNT}),
        "Response": obj(response),
    }


def _listings() -> dict[str, Schema]:
    record = {
        "index": COUNT,
        "id": TEXT,
        "choice": COUNT,
        "parent": null(COUNT),
        "created": NUMBER,
        "messages": array({"type": "object"}),
        "response": {"type": "object"},
        "finish_reason": {"enum": ["stop", "length"]},
        "status": {"enum": ["completed", "superseded"]},
        "weight_version": TEXT,
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "rows_compared": COUNT,
        "rows_differing": COUNT,
        "note": null(TEXT),
    }
    known = {"created": NUMBER, "recovered": FLAG, "recovered_from": null(COUNT), "in_flight": COUNT}
    metadata = obj({"accumulated_token_ids": array(COUNT)}, known)
    card = {"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT}
    info = {"model_path": TEXT, "served_model_name": TEXT, "is_generation": FLAG, "weight_version": null(TEXT)}
    lite = obj({"model_name": TEXT, "litellm_params": {"type": "object"}, "model_info": {"type": "object"}})
    return {
        "Health": obj({"status": {"const": "ok"}, "instance_id": TEXT, "version": TEXT}),
        "Created": obj({"session_id": TEXT}, {"api_key": TEXT}, "api_key: the session's, where tokens are asked for."),
        "Session": obj({"session_id": TEXT, "records": array(obj(record)), "metadata": metadata}),
        "Model": obj(card),
        "Models": obj({"object": {"const": "list"}, "data": array(ref("Model"))}),
        "ModelInfo": obj(info),
        "LiteModels": obj({"data": array(lite)}),
    }
