"""Messages -> text -> token ids, by the tokenizer's own chat template.

A family says which template arguments are fixed so that a longer conversation renders as the shorter one plus a suffix.
That is a claim: `tito` proves it on every request, and `Template` measures it once for the roles that agents may
append. Loading imports transformers (and torch where that is installed); importing this file does not.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pacenote.rollout.errors import BadRequest, StartupError
from pacenote.rollout.families import FAMILIES, KEPT, STRIPPED, UNTIL_ANSWERED, Family, detect_family
from pacenote.rollout.messages import Message, parse_message

__all__ = ["FAMILIES", "Family", "Template", "TemplateError", "detect_family", "first_difference", "shared"]

Tools = Sequence[Mapping[str, Any]] | None
Arguments = Mapping[str, Any]


class TemplateError(BadRequest):
    """The chat template refused the messages; the text is the template's."""

    code = "template_error"


_USER, _ANSWER, _MARK, _THOUGHT, _MORE = "question", "answer", "pacenote-probe", "pacenote-thought", "pacenote-more"


class Template:
    """A tokenizer with its chat template. Methods may be called from several threads.

    Attributes:
        family: which family it is used as.
        closing: what the template writes after an assistant's content once more follows: "" for GLM, whose next opener
            closes a turn, "<|im_end|>\\n" for ChatML, "<|end|>" for harmony.
        closings: all that it writes there; the closing of a tool call may be another one.
        thinking: what it does with the thinking of earlier turns, measured: KEPT, UNTIL_ANSWERED or STRIPPED.
        rewrites: role -> how the template rewrites history when a message of that role is appended to an answer; only
            roles of `append_roles` that do.

    Args:
        tokenizer: a transformers tokenizer.
        family: see `FAMILIES`.
        append_roles: roles for which append-only rendering is proven now.

    Raises:
        StartupError: no chat template; one that refuses or leaves out an appended message; or, where the family only
            appends, one that rewrites history.
    """

    def __init__(self, tokenizer: Any, family: Family, *, append_roles: Collection[str] = ()) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise StartupError("expected a tokenizer with a chat template, got one without: add chat_template.jinja")
        self.family = family.fitted(_source(tokenizer))
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._added = frozenset(tokenizer.get_added_vocab().values())
        self._lock = threading.Lock()
        self._headers: dict[str, str | None] = {}
        signature = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*signature, "messages", "conversations"}
        self._arguments_as_text = self._wants_text()
        self._ends = self._find_ends()
        self.closings = tuple(dict.fromkeys(self._ends.values()))
        self.closing = self.closings[0]
        self.thinking = self.find_thinking(dict(self.family.fixed))
        found = {role: self._prove(role) for role in sorted(append_roles)}
        self.rewrites = {role: difference for role, difference in found.items() if difference is not None}

    @classmethod
    def load(
        cls,
        model: str,
        *,
        family: str = "auto",
        append_roles: Collection[str] = (),
        chat_template: Path | None = None,
        trust_remote_code: bool = False,
    ) -> Template:
        """The template of a model.

        Args:
            model: directory with the tokenizer's files, or the name of a model in the local hub cache.
            family: a name of `FAMILIES`, or "auto": by the vocabulary and the template's text.
            append_roles: see the class.
            chat_template: a file to use instead of the tokenizer's own template.
            trust_remote_code: run the code that some models bring for their tokenizer, as Kimi's do.

        Raises:
            StartupError: no such model, no tokenizer in it, no such file, an unknown family, or as the class does.
        """
        if family != "auto" and family not in FAMILIES:
            raise StartupError(f"expected a family of auto, {', '.join(FAMILIES)}, got {family!r}")
        if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
            raise StartupError(f"expected a model directory, got {model}: no such directory")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever a tokenizer's files can make transformers raise
            raise StartupError(f"expected a model with a tokenizer, got {model}: {_line(error)}") from error
        if chat_template is not None:
            try:
                tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise StartupError(f"expected a chat template file, got {chat_template}: {_line(error)}") from error
        return cls(
            tokenizer,
            FAMILIES[family] if family != "auto" else _detect(tokenizer),
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
        plain = [self._shape(message.plain) for message in messages]
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
            return ids, self._starts(ids, text)

    def _starts(self, ids: Sequence[int], text: str) -> list[int]:
        """Where each token starts, by decoding: for tokenizers that do not say. All 0 if that gives another text."""
        starts, pending, place = [], [], 0
        for token in ids:
            starts.append(place)
            pending.append(token)
            piece = self.decode(pending)
            if piece and "\ufffd" not in piece:  # else a character whose last bytes are yet to come
                place, pending = place + len(piece), []
        return starts if place == len(text) else [0] * len(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def is_special(self, token: int) -> bool:
        """Whether this id is of a token that text is always split at, so that nothing merges across it."""
        return token in self._added

    def past(self, text: str) -> tuple[str, str] | None:
        """A history that ends with an answer, as it reads once more follows, and the closing it then has.

        Args:
            text: as rendered, without a generation prompt.

        Returns:
            (text, closing); None if the answer ends in no way that is known.
        """
        for end, later in self._ends.items():
            if text.endswith(end):
                return text[: len(text) - len(end)] + later, later
        return None

    def find_thinking(self, arguments: Arguments) -> str:
        """What becomes of thinking with these arguments, tried: KEPT, UNTIL_ANSWERED or STRIPPED."""
        kept = []
        for role in ("tool", "user"):
            messages = [*_probe(_ANSWER, tool=role == "tool", thinking=True), _message(role, _MORE)]
            try:
                text = self.render(messages, tools=None, arguments=arguments, generation=False)
            except TemplateError:  # of no harm if no such message will come; `_prove` speaks up if it may
                text = ""
            kept.append(_THOUGHT in text)
        return KEPT if kept[1] else UNTIL_ANSWERED if kept[0] else STRIPPED

    def _shape(self, plain: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message as this template reads it."""
        shaped = self.family.shape(plain)
        return _with_text(shaped) if self._arguments_as_text else shaped

    def _plainly(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        return self.render(messages, tools=None, arguments=dict(self.family.fixed), generation=generation)

    def _find_ends(self) -> dict[str, str]:
        """What the template writes after an answer that comes last -> what it writes there once more follows.

        Raises:
            StartupError: it does not write an answer's content.
        """
        try:
            last, open_ = (self._plainly(_probe(_MARK), generation=generation) for generation in (False, True))
            header = self.header(dict(self.family.fixed))
        except TemplateError as error:
            raise StartupError(f"expected a chat template that renders user and assistant: {error}") from error
        if _MARK not in last or _MARK not in open_:
            raise StartupError("expected a chat template that writes the assistant's content, got one that does not")
        end, later = last.rpartition(_MARK)[2], open_.rpartition(_MARK)[2]
        # Some templates open no new answer after an answer; there, nothing shows another closing.
        ends = {end: later.removesuffix(header) if header and later.endswith(header) else end}
        return ends | self._find_call_end(end)

    def _find_call_end(self, end: str) -> dict[str, str]:
        """The last special token of an answer that calls a tool, and what follows it, if it ends otherwise."""
        try:
            text = self._plainly(_probe(_ANSWER, tool=True))
        except TemplateError:
            return {}
        if _MARK not in text or text.endswith(end):
            return {}
        tail = text.rpartition(_MARK)[2]
        ids, starts = self.encode(tail)
        places = [start for token, start in zip(ids, starts, strict=True) if self.is_special(token)]
        return {tail[places[-1] :]: tail[places[-1] :]} if places else {}

    def _wants_text(self) -> bool:
        """Whether the arguments of tool calls are written only if they come as JSON text. Templates differ."""
        self._arguments_as_text = False
        objects = _probe(_ANSWER, tool=True)
        for messages in (objects, [replace(message, plain=_with_text(message.plain)) for message in objects]):
            try:
                if _MARK in self._plainly(messages):
                    return messages is not objects
            except TemplateError:
                continue
        return False

    def _prove(self, role: str) -> str | None:
        """How appending a message of this role rewrites history; None if it only appends."""
        history = _probe(_ANSWER, tool=role == "tool")
        leave = f"leave {role} out of --tito-allowed-append-roles"
        try:
            past = self.past(self._plainly(history))
            new = self._plainly([*history, _message(role, _MORE)], generation=True)
        except TemplateError as error:
            raise StartupError(
                f"expected a chat template that allows an appended {role} message (family {self.family.name}): "
                f"{error}; {leave}"
            ) from error
        if _MORE not in new:
            raise StartupError(
                f"expected a chat template that writes an appended {role} message (family {self.family.name}), got one "
                f"that leaves it out; {leave}"
            )
        difference = first_difference(past[0], new) if past is not None else "another end of the answer"
        if difference is not None and self.family.appends:
            raise StartupError(
                f"expected a chat template that only appends when a {role} message follows an answer (family "
                f"{self.family.name}), got one that rewrites: {difference}; {leave} or use a family that fits"
            )
        return difference


def shared(old: str, new: str) -> int:
    """How many characters two texts start with in common."""
    return bisect_left(range(1, min(len(old), len(new)) + 1), 1, key=lambda count: old[:count] != new[:count])


def first_difference(old: str, new: str) -> str | None:
    """None if `old` is a prefix of `new`, else where and how they part."""
    if new.startswith(old):
        return None
    at = shared(old, new)
    return f"at character {at} {old[at : at + 40]!r} became {new[at : at + 40]!r}"


def _probe(answer: str, *, tool: bool = False, thinking: bool = False) -> list[Message]:
    """A question and an answer, which calls a tool if a tool's message is to follow."""
    arguments = json.dumps({"word": _MARK})
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
    reply: dict[str, Any] = {"role": "assistant", "content": answer}
    if thinking:  # a call's content may not stand beside thinking in every template
        reply |= {"reasoning_content": _THOUGHT} | ({"content": ""} if tool else {})
    return [_message("user", _USER), parse_message(reply | ({"tool_calls": [call]} if tool else {}), "probe")]


def _message(role: str, text: str) -> Message:
    extra = {"tool_call_id": "call00000", "name": "f"} if role == "tool" else {}
    return parse_message({"role": role, "content": text} | extra, "probe")


def _detect(tokenizer: Any) -> Family:
    return detect_family(tokenizer.get_vocab(), _source(tokenizer) if tokenizer.chat_template else "")


def _source(tokenizer: Any) -> str:
    """The chat template's text; of several, all."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else "\n".join(template.values())


def _with_text(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with the arguments of its tool calls as JSON text."""
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in plain.get("tool_calls", ())
    ]
    return {**plain, "tool_calls": calls} if calls else plain


def _line(error: Exception) -> str:
    """An error's text on one line."""
    return re.sub(r"\s+", " ", str(error)).strip()[:500] or type(error).__name__
