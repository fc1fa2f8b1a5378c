"""Environment: the policy calls Python functions until it answers without a call.

The functions are those in TOOLS of a module, `{name: function}`, and no others: the module is named by the task's
`toolbox` (a row's "toolbox" in JSON lines) or by a `ToolLoop` of your own. Whatever is wrong with a call comes back to
the policy as the call's result.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from pacenote.trainer import limited
from pacenote.trainer.tasks import Chat, Message, Task

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
Tools = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolLoop:
    """The environment with its limits; functions may be sync or async, those of one answer run side by side."""

    toolbox: str | None = None
    """Module with TOOLS, for tasks that name none."""
    turns: int = 8
    """Answers at most."""
    seconds: float = 10.0
    """Longest call; a sync function that overruns goes on in its thread, unheeded."""
    longest: int = 8192
    """Characters of a result; the rest is cut off."""

    async def __call__(self, chat: Chat, task: Task) -> list[Message]:
        """Play a task; ends early where the context is full.

        Raises:
            ValueError: neither the task nor the loop names a module, or it has no TOOLS.
        """
        tools = load_tools(task.toolbox or self.toolbox)
        offered = task.tools or [describe(name, function) for name, function in tools.items()]
        messages = list(task.messages)
        for _ in range(self.turns):
            try:
                answer = await chat(messages, tools=offered)
            except httpx.HTTPStatusError as error:
                if len(messages) > len(task.messages) and "context_length_exceeded" in error.response.text:
                    break
                raise
            messages.append(answer)
            calls = answer.get("tool_calls") or []
            if not calls:
                break
            messages += await asyncio.gather(*(self._answer(tools, call) for call in calls))
        return messages

    async def _answer(self, tools: Tools, call: Any) -> Message:
        """The tool's message for one call, whatever the call looks like."""
        call_id = call.get("id") if isinstance(call, dict) else None
        try:
            said = await self._result(tools, call)
        except limited.OutOfTime:
            said = f"error: not done after {self.seconds:g} s"
        except Exception as error:  # of somebody's function, which the policy should read
            said = f"error: {type(error).__name__}: {error}"
        if len(said) > self.longest:
            said = f"{said[: self.longest]}... ({len(said) - self.longest} more characters)"
        return {"role": "tool", "tool_call_id": call_id if isinstance(call_id, str) else "", "content": said}

    async def _result(self, tools: Tools, call: Any) -> str:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or name not in tools:
            return f"error: there is no tool {name!r}; the tools are: {', '.join(sorted(tools))}"
        given = function.get("arguments") or "{}"
        try:
            arguments = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError) as error:
            return f"error: the arguments of {name} are not JSON: {error}"
        if not isinstance(arguments, dict):
            return f"error: the arguments of {name} must be a JSON object, not {type(arguments).__name__}"
        try:
            inspect.signature(tools[name]).bind(**arguments)
        except TypeError as error:
            return f"error: the arguments of {name} do not fit: {error}"
        value = await limited.call(functools.partial(tools[name], **arguments), timeout=self.seconds)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def load_tools(module: str | None) -> Tools:
    """TOOLS of a module.

    Raises:
        ValueError: no module, or it cannot be imported, or has no mapping of functions called TOOLS.
    """
    if module is None:
        raise ValueError("the tool loop expects a toolbox, the name of a module with TOOLS: give the task one")
    try:
        tools = getattr(importlib.import_module(module), "TOOLS", None)
    except ImportError as error:
        raise ValueError(f"toolbox {module!r}: cannot be imported ({error}); is it on PYTHONPATH?") from error
    if not isinstance(tools, Mapping) or not tools or not all(callable(function) for function in tools.values()):
        raise ValueError(f"toolbox {module!r}: expected TOOLS to be a non-empty mapping of names to functions")
    return tools


def describe(name: str, function: Callable[..., Any]) -> Message:
    """OpenAI's description of a function, from its docstring and its parameters' annotations."""
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"tool {name}: parameter {parameter.name} cannot be given by name")
        properties[parameter.name] = _schema(hints.get(parameter.name))
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required}
    said = inspect.getdoc(function) or ""
    return {"type": "function", "function": {"name": name, "description": said, "parameters": schema}}


def _schema(hint: Any) -> dict[str, Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(part) for part in typing.get_args(hint)]}
    if hint is type(None):
        return {"type": "null"}
    kind = _JSON_TYPES.get(typing.get_origin(hint) or hint)
    return {"type": kind} if kind else {}


tool_loop = ToolLoop()
