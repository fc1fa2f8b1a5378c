"""A committed turn -> OpenAI's bodies for the client: `chat.completion`, or the same as server-sent events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from pacenote.rollout.sglang import Reply
from pacenote.rollout.turn import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a client gets: no meta info, no routes.

    Attributes:
        turn: as committed.
        reply: the engine's.
        prompt_ids: ids of the whole prompt.
        model: name to answer with.
    """

    turn: Turn
    reply: Reply
    prompt_ids: list[int]
    model: str

    def body(self) -> dict[str, Any]:
        """The `chat.completion` object."""
        raw = self.turn.answer.message.raw
        # Without the key, litellm takes a leading <think> block out of the content.
        message: dict[str, Any] = {"role": "assistant", "content": raw.get("content"), "reasoning_content": None, **raw}
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        return self._head("chat.completion") | {
            "choices": [self._choice() | {"message": message}],
            "usage": self.usage,
            "prompt_token_ids": self.prompt_ids,  # where clients of vLLM look; SGLang has them in the choice
        }

    def events(self, *, usage: bool) -> Iterator[bytes]:
        """Server-sent events: the whole answer as one chunk, the usage if asked for, [DONE]."""
        delta = dict(self.body()["choices"][0]["message"])
        if "tool_calls" in delta:
            delta["tool_calls"] = [{**call, "index": place} for place, call in enumerate(delta["tool_calls"])]
        head = self._head("chat.completion.chunk")
        yield _event(head | {"choices": [self._choice() | {"delta": delta}]} | ({"usage": None} if usage else {}))
        if usage:
            yield _event(head | {"choices": [], "usage": self.usage})
        yield b"data: [DONE]\n\n"

    @property
    def usage(self) -> dict[str, int]:
        """Token counts; the prompt's include the whole history."""
        prompt, answer = len(self.prompt_ids), len(self.turn.answer.ids)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.turn.id, "object": kind, "created": int(self.turn.created), "model": self.model}

    def _choice(self) -> dict[str, Any]:
        return {
            "index": 0,
            "finish_reason": self.reply.finish_reason,
            "logprobs": self.reply.logprobs,
            "token_ids": self.turn.answer.ids.tolist(),
            "prompt_token_ids": self.prompt_ids,
        }


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
