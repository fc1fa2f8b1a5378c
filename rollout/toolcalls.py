"""The model's text -> content, reasoning and tool calls. GLM-4.7's format; no torch.

The format (chat template of GLM-4.7, parsed by SGLang's `--tool-call-parser glm47` and `--reasoning-parser glm45`):

    <think>reasoning</think>content<tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value>...</tool_call>

A value is a plain string if the function's schema says so, else JSON. Nothing raises: a call that is not well-formed
or names a function that was not offered stays in the content as it was written.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOOL_CALL_PARSERS = ("glm47",)
REASONING_PARSERS = ("glm45",)
THINK, END_THINK = "<think>", "</think>"

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedText:
    """A message taken apart.

    Attributes:
        content: text outside of well-formed calls.
        tool_calls: OpenAI's `message.tool_calls` with SGLang's `index`; arguments are a JSON text.
    """

    content: str
    tool_calls: tuple[dict[str, Any], ...]


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> ParsedText:
    """Take the well-formed calls of offered functions out of a model's text.

    Args:
        text: the model's answer.
        tools: OpenAI's `tools` of the request; entries of another shape are ignored.
    """
    schemas = _schemas(tools)
    calls: list[dict[str, Any]] = []
    kept: list[str] = []
    end = 0
    for match in _CALL.finditer(text):
        call = _parse_call(match.group(1), schemas)
        if call is None:
            continue
        name, arguments = call
        kept.append(text[end : match.start()])
        end = match.end()
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append(
            {"id": f"call_{uuid.uuid4().hex[:24]}", "index": len(calls), "type": "function", "function": function}
        )
    if not calls:
        return ParsedText(content=text, tool_calls=())
    kept.append(text[end:])
    return ParsedText(content="".join(kept).strip(), tool_calls=tuple(calls))


def split_reasoning(text: str, *, opened: bool) -> tuple[str | None, str]:
    """Split a model's text into (reasoning or None, content).

    Args:
        text: the model's answer.
        opened: the prompt ended with <think>, so that the text starts inside the reasoning.

    As SGLang's: white space stays, a tool call ends reasoning that does not end itself, and else such reasoning (the
    answer ran into its length) takes the whole text.
    """
    if not opened and THINK not in text:
        return None, text
    while text.startswith(THINK):
        text = text[len(THINK) :]
    reasoning, closed, content = text.partition(END_THINK)
    if not closed:
        reasoning, call, rest = text.partition("<tool_call>")
        content = call + rest
    return reasoning or None, content


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Function name -> its parameters' JSON schemas by parameter name."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            continue
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        schemas[function["name"]] = properties if isinstance(properties, Mapping) else {}
    return schemas


def _parse_call(body: str, schemas: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of the text between the call's tags, or None if it is not well-formed."""
    start = body.find("<arg_key>")
    name = (body if start < 0 else body[:start]).strip()
    if name not in schemas:
        return None
    arguments: dict[str, Any] = {}
    position = len(body) if start < 0 else start
    while position < len(body):
        match = _ARGUMENT.match(body, position)
        if match is None:
            return None
        key, value = match.group(1).strip(), match.group(2)
        arguments[key] = _value(value, schemas[name].get(key))
        position = match.end()
    return name, arguments


def _value(text: str, schema: Any) -> Any:
    """An argument's value: a string where the schema says so, else JSON, else the text itself."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = kind if isinstance(kind, list) else [kind]
    if "string" in kinds:
        return None if "null" in kinds and text.strip() == "null" else text
    try:
        value = json.loads(text)
        # NaN, 1e999 and lone surrogates parse but cannot be sent: such a value stays a text.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return value
