"""Messages -> text -> token ids, by the tokenizer's own chat template.

A family says which template arguments are fixed so that a longer conversation renders as the shorter one plus a suffix.
That is a claim: `tito` proves it on every request, and `Template.load` proves it once for the roles that agents may
append. Loading imports transformers (and torch where that is installed); importing this file does not.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pacenote.rollout.errors import BadRequest, StartupError
from pacenote.rollout.messages import Message, parse_message

Tools = Sequence[Mapping[str, Any]] | None
Arguments = Mapping[str, Any]


class TemplateError(BadRequest):
    """The chat template refused the messages; the text is the template's."""

    code = "template_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models whose chat templates behave alike.

    Attributes:
        name: as in `--family`.
        markers: tokens that a vocabulary must hold for `auto` to choose this family.
        fixed: template arguments that clients may not change.
    """

    name: str
    markers: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    family.name: family
    for family in (
        # GLM-4.5, 4.6, 4.7, 5. Their templates take the thinking out of earlier turns unless told not to.
        Family(
            name="glm47",
            markers=frozenset({"[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"}),
            fixed={"clear_thinking": False},
        ),
        Family(name="default"),
    )
}
_USER, _ANSWER, _MARK = "question", "answer", "pacenote-probe"


class Template:
    """A tokenizer with its chat template. Methods may be called from several threads.

    Attributes:
        family: which family it is used as.
        closing: what the template writes after an assistant's content: "" for GLM, whose next opener closes a turn,
            "<|im_end|>\\n" for ChatML.

    Args:
        tokenizer: a transformers tokenizer.
        family: see `FAMILIES`.
        append_roles: roles for which append-only rendering is proven now.

    Raises:
        StartupError: no chat template, or one that rewrites history when a message is appended.
    """

    def __init__(self, tokenizer: Any, family: Family, *, append_roles: Collection[str] = ()) -> None:
        self.family = family
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._lock = threading.Lock()
        self._headers: dict[str, str | None] = {}
        if not getattr(tokenizer, "chat_template", None):
            raise StartupError("expected a tokenizer with a chat template, got one without: add chat_template.jinja")
        signature = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*signature, "messages", "conversations"}
        self.closing = self._find_closing()
        for role in sorted(append_roles):
            self._prove(role)

    @classmethod
    def load(cls, model: str, *, family: str = "auto", append_roles: Collection[str] = ()) -> Template:
        """The template of a model.

        Args:
            model: directory with the tokenizer's files, or the name of a model in the local hub cache.
            family: a name of `FAMILIES`, or "auto": by the tokens of the vocabulary.
            append_roles: see the class.

        Raises:
            StartupError: no such model, no tokenizer in it, an unknown family, or as the class does.
        """
        if family != "auto" and family not in FAMILIES:
            raise StartupError(f"expected a family of auto, {', '.join(FAMILIES)}, got {family!r}")
        if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
            raise StartupError(f"expected a model directory, got {model}: no such directory")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except Exception as error:  # whatever a tokenizer's files can make transformers raise
            raise StartupError(f"expected a model with a tokenizer, got {model}: {_line(error)}") from error
        vocabulary = tokenizer.get_vocab()
        return cls(
            tokenizer,
            FAMILIES[family] if family != "auto" else detect_family(vocabulary),
            append_roles=append_roles,
        )

    def arguments(self, requested: object, effort: object = None) -> dict[str, Any]:
        """The template arguments of a request: its `chat_template_kwargs` and `reasoning_effort`, and the fixed ones.

        Raises:
            BadRequest: no object, a name that is no template variable, or another value for a fixed one.
        """
        if requested is not None and not isinstance(requested, Mapping):
            raise BadRequest(
                f"chat_template_kwargs must be an object, got {type(requested).__name__}", param="chat_template_kwargs"
            )
        arguments = dict(requested or {})
        for name, value in arguments.items():
            if name in self._reserved or name.endswith("_token"):
                raise BadRequest(f"chat_template_kwargs.{name} cannot be set", param="chat_template_kwargs")
            if name in self.family.fixed and value != self.family.fixed[name]:
                raise BadRequest(
                    f"chat_template_kwargs.{name} is {self.family.fixed[name]!r} in family {self.family.name}, so that "
                    f"history stays as it was sampled; got {value!r}: leave it out",
                    param="chat_template_kwargs",
                )
        return ({} if effort is None else {"reasoning_effort": effort}) | arguments | dict(self.family.fixed)

    def render(self, messages: Iterable[Message], *, tools: Tools, arguments: Arguments, generation: bool) -> str:
        """The conversation's text.

        Args:
            messages: at least one.
            tools: OpenAI's tools, or None.
            arguments: of `arguments`.
            generation: end with the header of the assistant's next message.

        Raises:
            TemplateError: the template refuses.
        """
        plain = [message.plain for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                plain,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=generation,
                **arguments,
            )
        except Exception as error:  # a template is a program of its own and may raise anything
            raise TemplateError(f"the chat template refused the messages: {_line(error)}", param="messages") from error
        return text

    def header(self, arguments: Arguments) -> str | None:
        """What `generation` adds after a user's message, such as "<|assistant|><think>"; None if it rewrites."""
        name = repr(sorted(arguments.items(), key=lambda item: item[0]))
        if name not in self._headers:
            probe = [_message("user", _USER)]
            bare = self.render(probe, tools=None, arguments=arguments, generation=False)
            full = self.render(probe, tools=None, arguments=arguments, generation=True)
            if len(self._headers) > 256:  # a client that varies its arguments must not fill memory
                self._headers.clear()
            self._headers[name] = full[len(bare) :] if full.startswith(bare) else None
        return self._headers[name]

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the character at which each starts. Nothing is added or cut."""
        if self._backend is not None:
            # The tokenizer object itself sets padding and truncation on each call, which threads may not share.
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, [start for start, _ in encoding.offsets]
        with self._lock:
            ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        return ids, [0] * len(ids)

    def _find_closing(self) -> str:
        arguments = dict(self.family.fixed)
        try:
            text = self.render(_probe(_MARK), tools=None, arguments=arguments, generation=False)
        except TemplateError as error:
            raise StartupError(f"expected a chat template that renders user and assistant: {error}") from error
        if _MARK not in text:
            raise StartupError("expected a chat template that writes the assistant's content, got one that does not")
        return text.rpartition(_MARK)[2]

    def _prove(self, role: str) -> None:
        """Check that appending a message of this role only appends text, and keeps the answer's closing."""
        history = _probe(_ANSWER, tool=role == "tool")
        arguments = dict(self.family.fixed)
        try:
            old = self.render(history, tools=None, arguments=arguments, generation=False)
            new = self.render([*history, _message(role, "more")], tools=None, arguments=arguments, generation=True)
        except TemplateError as error:
            raise StartupError(
                f"expected a chat template that allows an appended {role} message (family {self.family.name}): "
                f"{error}; leave {role} out of --tito-allowed-append-roles"
            ) from error
        difference = first_difference(old, new)
        if difference is not None or not old.endswith(self.closing):
            raise StartupError(
                f"expected a chat template that only appends when a {role} message follows an answer (family "
                f"{self.family.name}), got one that rewrites: {difference or 'another end of the answer'}; leave "
                f"{role} out of --tito-allowed-append-roles or use a family that fits"
            )


def detect_family(vocabulary: Collection[str]) -> Family:
    """The family whose markers the vocabulary holds, else `default`."""
    for family in FAMILIES.values():
        if family.markers and all(marker in vocabulary for marker in family.markers):
            return family
    return FAMILIES["default"]


def first_difference(old: str, new: str) -> str | None:
    """None if `old` is a prefix of `new`, else where and how they part."""
    if new.startswith(old):
        return None
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return f"at character {at} {old[at : at + 40]!r} became {new[at : at + 40]!r}"


def _probe(answer: str, *, tool: bool = False) -> list[Message]:
    """A question and an answer, which calls a tool if a tool's message is to follow."""
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    reply = {"role": "assistant", "content": answer} | ({"tool_calls": [call]} if tool else {})
    return [_message("user", _USER), parse_message(reply, "probe")]


def _message(role: str, text: str) -> Message:
    extra = {"tool_call_id": "call00000", "name": "f"} if role == "tool" else {}
    return parse_message({"role": role, "content": text} | extra, "probe")


def _line(error: Exception) -> str:
    """An error's text on one line."""
    return re.sub(r"\s+", " ", str(error)).strip()[:500] or type(error).__name__
