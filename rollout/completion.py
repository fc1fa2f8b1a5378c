"""Replies -> OpenAI's bodies for the client: `chat.completion`, or the same as server-sent events.

The body is written before the turns are committed, so that an answer that cannot be passed on is not recorded either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from pacenote.rollout.errors import UpstreamError
from pacenote.rollout.sglang import Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a client gets: no meta info, no routes.

    Attributes:
        data: the `chat.completion` object as JSON.
        abandon: to be called if no client got it.
    """

    data: bytes
    abandon: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @classmethod
    def of(
        cls, replies: Sequence[Reply], *, id: str, created: float, model: str, prompt_ids: NDArray[np.int32]
    ) -> Completion:
        """The completion of one request.

        Args:
            replies: one a choice.
            id: the completion's.
            created: seconds since the epoch.
            model: name to answer with.
            prompt_ids: [P] ids of the whole prompt.

        Raises:
            UpstreamError: an engine's message or logprobs that cannot be written as JSON.
        """
        prompt, answer = len(prompt_ids), sum(len(reply.answer.ids) for reply in replies)
        body = {
            "id": id,
            "object": "chat.completion",
            "created": int(created),
            "model": model,
            "choices": [_choice(reply, index, prompt_ids) for index, reply in enumerate(replies)],
            "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
            "prompt_token_ids": prompt_ids,  # where clients of vLLM look; SGLang has them in the choice
        }
        try:
            return cls(data=orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
        except orjson.JSONEncodeError as error:
            raise UpstreamError(f"the engine's answer cannot be passed on: {error}") from error

    def body(self) -> dict[str, Any]:
        """The object."""
        body: dict[str, Any] = orjson.loads(self.data)
        return body

    def events(self, *, usage: bool) -> list[bytes]:
        """Server-sent events: each choice as one chunk, the usage if asked for, [DONE]."""
        body = self.body()
        head = {name: body[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
        none: dict[str, Any] = {"usage": None} if usage else {}
        events = [_event(head | {"choices": [_chunk(choice)]} | none) for choice in body["choices"]]
        if usage:
            events.append(_event(head | {"choices": [], "usage": body["usage"]}))
        return [*events, b"data: [DONE]\n\n"]


def _choice(reply: Reply, index: int, prompt_ids: NDArray[np.int32]) -> dict[str, Any]:
    raw = reply.answer.message.raw
    # Without the key, litellm takes a leading <think> block out of the content.
    message: dict[str, Any] = {"role": "assistant", "content": raw.get("content"), "reasoning_content": None, **raw}
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return {
        "index": index,
        "message": message,
        "finish_reason": reply.finish_reason,
        "logprobs": reply.logprobs,
        "token_ids": reply.answer.ids,
        "prompt_token_ids": prompt_ids,
    }


def _chunk(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a stream: its message is a delta, its tool calls are numbered."""
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{**call, "index": place} for place, call in enumerate(delta["tool_calls"])]
    return {name: field for name, field in choice.items() if name != "message"} | {"delta": delta}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
