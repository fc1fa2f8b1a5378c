"""How much one request may ask for: depth of its JSON, messages, tokens of its prompt and of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pacenote.rollout.bounds import at_least_one
from pacenote.rollout.errors import TOO_LONG, BadRequest, ContextOverflow
from pacenote.rollout.nesting import is_deeper

_BUDGETS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Bounds on one request.

    Attributes:
        depth: levels of lists and objects in its JSON.
        messages: of a chat, after translation from another dialect.
        prompt_tokens: of the rendered prompt; None leaves it to the engine.
        new_tokens: of one answer; None leaves it to the engine.

    Raises:
        ValueError: a bound below 1.
    """

    depth: int = 100
    messages: int = 10_000
    prompt_tokens: int | None = None
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        at_least_one(
            max_depth=self.depth,
            max_messages=self.messages,
            max_prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.new_tokens,
        )

    def check_depth(self, raw: bytes) -> None:
        """Look at a body before it is parsed.

        Raises:
            BadRequest: it is nested too deeply.
        """
        if is_deeper(raw, self.depth):
            raise BadRequest(
                f"expected JSON of at most {self.depth} levels of lists and objects (--max-depth), got more: send what "
                "is nested deeper as a text"
            )

    def check_messages(self, request: Mapping[str, Any]) -> None:
        """Look at a chat before its messages are read; what is no list of messages is refused elsewhere.

        Raises:
            BadRequest: too many of them.
        """
        messages = request.get("messages")
        if isinstance(messages, list) and len(messages) > self.messages:
            raise BadRequest(
                f"expected at most {self.messages} messages (--max-messages), got {len(messages)}: start another "
                "history, for example from a summary",
                param="messages",
            )

    def budgeted(self, request: dict[str, Any]) -> dict[str, Any]:
        """The chat with a bound on its answer: its own, or else this one.

        Raises:
            BadRequest: its own is above this one, or is no number of tokens.
        """
        most = self.new_tokens
        if most is None:
            return request
        asked = {name: request[name] for name in _BUDGETS if request.get(name) is not None}
        for name, value in asked.items():
            # Engines also take "9" and 9.0 for 9, and 0 for no bound at all.
            if type(value) is not int or not 1 <= value <= most:
                raise BadRequest(
                    f"expected {name} as a whole number in 1..{most} (--max-new-tokens), got {value!r:.80}: ask for "
                    "less, or leave it out",
                    param=name,
                )
        return request if asked else request | {"max_tokens": most}

    def check_prompt(self, tokens: int) -> None:
        """Look at a rendered prompt.

        Raises:
            ContextOverflow: it is too long.
        """
        if self.prompt_tokens is not None and tokens > self.prompt_tokens:
            raise ContextOverflow(
                f"the prompt ({tokens} tokens) is longer than --max-prompt-tokens ({self.prompt_tokens} tokens): start "
                f"another history, for example from a summary {TOO_LONG}",
                param="messages",
            )


USUAL = RequestLimits()
"""What holds where nothing else is said."""
