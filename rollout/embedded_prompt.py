"""Messages and texts -> prompt ids, through the model's own tokenizer and chat template, away from the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson

from pacenote.rollout.embedded_protocol import ChatBody
from pacenote.rollout.embedded_request import RequestError


class Prompts:
    """Renders and encodes with one transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = asyncio.Lock()  # a fast tokenizer may not be configured and used at once

    async def render(self, body: ChatBody) -> list[int]:
        """The ids of a chat request's messages and tools.

        Raises:
            RequestError: the chat template refused them.
        """
        messages = [_plain_message(message) for message in body.messages]

        def render() -> str:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=body.offered_tools or None,
                tokenize=False,
                add_generation_prompt=not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                **(body.chat_template_kwargs or {}),
            )
            return text

        try:
            text = await asyncio.to_thread(render)
        except Exception as error:  # a template is a program of its own and may raise anything
            raise RequestError(f"the chat template refused the messages: {error}") from error
        return await self.encode(text, special=False)

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text; `special` adds the tokenizer's own begin and end tokens."""
        async with self._lock:
            return list(await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=special))


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates want it: arguments of tool calls are objects, not JSON texts (as SGLang does)."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    plain = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(orjson.JSONDecodeError):
                function = function | {"arguments": orjson.loads(function["arguments"] or "{}")}
            call = call | {"function": function}
        plain.append(call)
    return message | {"tool_calls": plain}
