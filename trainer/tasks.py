"""Tasks, environments and rewards: what the policy is asked, who answers it, and what that was worth.

An environment is one async function over a chat: it sends messages, reads answers and returns the whole conversation.
A reward is one function of that conversation and the task's label, sync or async. Both are named by import path,
`module:function`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import httpx

from pacenote.trainer import limited

Message: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt: OpenAI `messages` to start from, the `label` that the reward knows, and OpenAI `tools` if any.

    `toolbox` names the module whose TOOLS the environment `environments.tools:tool_loop` calls.
    """

    messages: list[Message]
    label: Any = None
    tools: list[Message] | None = None
    toolbox: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation partner at an OpenAI-compatible base URL; calling it returns the assistant's message.

    `base_url` is the session's, for environments that bring an OpenAI client of their own. `seed` starts the sampler:
    every turn draws from a seed of its own, because the same draws again would make a turn repeat the one before.
    """

    client: httpx.AsyncClient
    base_url: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    async def __call__(self, messages: list[Message], **overrides: Any) -> Message:
        """Send `messages` (the whole history) and return the answer's message.

        Raises:
            httpx.HTTPStatusError: the server refused; the text carries its reason.
        """
        drawn = {} if self.seed is None else {"seed": random.Random(f"{self.seed}/{len(messages)}").getrandbits(31)}
        body = {**self.defaults, **drawn, **overrides, "messages": messages}
        response = await self.client.post(f"{self.base_url}/chat/completions", json=body)
        if response.is_error:
            raise httpx.HTTPStatusError(
                f"{response.status_code} from {self.base_url}: {response.text[:500]}",
                request=response.request,
                response=response,
            )
        message: Message = response.json()["choices"][0]["message"]
        return message


Environment: TypeAlias = Callable[[Chat, Task], Awaitable[list[Message]]]
Reward: TypeAlias = Callable[[list[Message], Any], Any]


class TaskSource(Protocol):
    """Gives the tasks of a step; the same seed and step give the same tasks, so a resumed run goes on where it was."""

    def __call__(self, *, seed: int, step: int, count: int) -> list[Task]:
        """Return `count` tasks."""
        ...


async def single_turn(chat: Chat, task: Task) -> list[Message]:
    """Environment: one question, one answer."""
    return [*task.messages, await chat(task.messages, **({"tools": task.tools} if task.tools else {}))]


def answer_text(messages: list[Message]) -> str:
    """Text of the last assistant message, its text parts joined; empty where there is none."""
    content = next((m.get("content") for m in reversed(messages) if m["role"] == "assistant"), None)
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")


def contains_label(messages: list[Message], label: Any) -> float:
    """Reward: 1 if the last assistant message contains the label's text, else 0."""
    return float(str(label) in answer_text(messages))


Unrewarded: TypeAlias = Literal["timeout", "none", "not a number", "not finite"]
"""Why a conversation has no reward: the limit was over, the reward gave None, something else, or NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Worth:
    """What a conversation earned: a finite `value`, or None and the reason."""

    value: float | None
    reason: Unrewarded | None = None


async def judge(reward: Reward, messages: list[Message], label: Any, *, timeout: float | None = None) -> Worth:
    """Call a reward; one that is not `async def` runs in a thread, so that it does not hold the event loop up.

    Args:
        timeout: seconds; None is no limit.

    Raises:
        Exception: what the reward raised.
    """
    try:
        value = await limited.call(reward, messages, label, timeout=timeout)
    except limited.OutOfTime:
        return Worth(None, "timeout")
    if value is None:
        return Worth(None, "none")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return Worth(None, "not a number")
    return Worth(number) if math.isfinite(number) else Worth(None, "not finite")


async def score(reward: Reward, messages: list[Message], label: Any, timeout: float | None = None) -> float | None:
    """The value of `judge`: None where the reward gives None, NaN, what is not a number, or takes too long."""
    return (await judge(reward, messages, label, timeout=timeout)).value


def check_labels(reward: Reward, tasks: Iterable[Task]) -> None:
    """Let a reward look at the labels before a run: `check_label(label)` of the reward's module, if it has one.

    Raises:
        ValueError: a label is wrong; the message counts the task from 1 and says what `check_label` said.
    """
    check = getattr(inspect.getmodule(reward), "check_label", None)
    if not callable(check):
        return
    for number, task in enumerate(tasks, 1):
        try:
            check(task.label)
        except ValueError as error:
            raise ValueError(f"label of task {number}: {error}") from error


def load_callable(path: str, what: str) -> Any:
    """Import `module:name`.

    Raises:
        ValueError: the path is malformed, the module cannot be imported, or the name is missing or not callable.
    """
    module_name, _, name = path.partition(":")
    if not name:
        raise ValueError(f"--{what} expects an import path like package.module:function, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"--{what} {path}: cannot import {module_name!r} ({error}); is it on PYTHONPATH?") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"--{what} {path}: {module_name!r} has no callable {name!r}")
    return found


@dataclass(frozen=True, slots=True)
class JsonlTasks:
    """A TaskSource over the rows of a file: every row once an epoch, in an order drawn from seed and epoch."""

    rows: tuple[Task, ...]

    def __call__(self, *, seed: int, step: int, count: int) -> list[Task]:
        """Return the `count` tasks that stand at the step's place in the endless shuffled stream."""
        picked = []
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, len(self.rows))
            picked.append(self.rows[_order(seed, epoch, len(self.rows))[index]])
        return picked


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def read_jsonl(path: Path) -> JsonlTasks:
    """Read tasks from JSON lines with OpenAI `messages` (a non-empty list ending in a turn to answer) and `label`.

    Raises:
        ValueError: the file is missing or empty, or a line is not such an object; the line's number is named.
    """
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file")
    tasks = [_task(line, path, number) for number, line in enumerate(path.open(encoding="utf-8"), 1) if line.strip()]
    if not tasks:
        raise ValueError(f'--data {path}: the file has no rows; give one JSON object a line: {{"messages", "label"}}')
    return JsonlTasks(tuple(tasks))


def _task(line: str, path: Path, number: int) -> Task:
    def fail(reason: str) -> ValueError:
        return ValueError(f"--data {path}, line {number}: {reason}")

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise fail(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise fail(f"expected an object with messages and label, got {type(row).__name__}")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise fail("expected 'messages' to be a non-empty list of OpenAI messages")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise fail(f"messages[{place}] is not an object with a role")
    if messages[-1]["role"] == "assistant":
        raise fail("the last message is the assistant's; end on the turn that the policy has to answer")
    toolbox = row.get("toolbox")
    if toolbox is not None and not isinstance(toolbox, str):
        raise fail(f"expected 'toolbox' to be a module's name, got {type(toolbox).__name__}")
    return Task(messages=messages, label=row.get("label"), tools=row.get("tools"), toolbox=toolbox)
