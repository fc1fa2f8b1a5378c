"""One turn of a session: the prompt that was sent, the answer that was sampled, and the turn that both make.

A turn holds only what is new; the rest hangs on `parent`. Legend: A tokens a turn appends to its parent's (not
generated), G tokens it generates, R routing rows it brings, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from pacenote.replay.record import RoutingRecord
from pacenote.rollout.messages import Message


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Render:
    """What proves later that a template has not rewritten this prompt.

    Attributes:
        length: characters of the request's messages as rendered, without the generation prompt.
        digest: of those characters.
        tools, arguments: what they were rendered with.
    """

    length: int
    digest: bytes
    tools: Sequence[Mapping[str, Any]] | None
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A request, rendered: the tokens to append to the parent's.

    Attributes:
        parent: the turn whose answer the request extends; None starts a new root.
        appended: the messages after that answer; all of the request's for a root.
        drop: 1 if the parent's last token (a sampled stop token) gives way to the next role's opener, else 0.
        ids: [A] int32.
        spans: (role, tokens) of each appended message, the answer's header last; the tokens add up to A.
        path: digest of all the request's messages (`messages.chain`).
        render: proof for the next turn.
        note: why a root was rendered although the session knew the history; else None.
        length: tokens of the whole prompt.
    """

    parent: Turn | None
    appended: tuple[Message, ...]
    drop: int
    ids: NDArray[np.int32]
    spans: tuple[tuple[str, int], ...]
    path: bytes
    render: Render
    note: str | None = None
    length: int = field(init=False)

    def __post_init__(self) -> None:
        # Kept, not followed up the line: a session may have thousands of turns.
        before = self.parent.length - self.drop if self.parent else 0
        object.__setattr__(self, "length", before + len(self.ids))

    @property
    def rows_held(self) -> int:
        """Routing rows that the session has for this prompt: one for each token of the parent's but its last.

        Whether that last token stays or gives way to an opener, the row at its place is still unknown.
        """
        return self.parent.length - 1 if self.parent else 0

    def token_ids(self) -> NDArray[np.int32]:
        """All ids of the prompt [P] int32, root first."""
        parts: list[NDArray[np.int32]] = [self.ids]
        turn, drop = self.parent, self.drop
        while turn is not None:
            parts += [turn.answer.ids[: len(turn.answer.ids) - drop], turn.prompt.ids]
            prompt = turn.prompt
            turn, drop = prompt.parent, prompt.drop
        return np.concatenate(parts[::-1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What an engine sampled, checked.

    Attributes:
        message: the assistant's message.
        ids: [G] int32, G >= 1, the stop token included if one was sampled.
        logprobs: [G] float32, of the temperature-scaled distribution.
        versions: [G] int32, weight version of each; -1 if unknown or not a number.
        version_name: the engine's own name of the last of them.
        rows: R = prompt + G - 1 - rows_held rows; None without routing replay.
        finish: "stop" | "length".
        stopped: the last id is a stop token (rather than the end of a stop text, or of the budget).
        note: what was out of the ordinary on the engine's side; else None.
        rows_compared: rows that the session held and the engine sent again under the same weight version.
        rows_differing: those of them whose experts were others; the session keeps what it held.
        choice: which of the request's choices it is, from 0.
    """

    message: Message
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    version_name: str
    rows: RoutingRecord | None
    finish: str
    stopped: bool
    note: str | None = None
    rows_compared: int = 0
    rows_differing: int = 0
    choice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """A committed turn: a checkpoint that later requests may extend.

    Attributes:
        number: place in the session's order of commits.
        id: the completion's id, as the client got it; the choices of one request share it.
        path: digest of all messages up to and with the answer.
        created: seconds since the epoch.
    """

    number: int
    id: str
    prompt: Prompt
    answer: Answer
    path: bytes
    created: float

    @property
    def parent(self) -> Turn | None:
        """The turn that this one extends."""
        return self.prompt.parent

    @property
    def length(self) -> int:
        """Tokens of the whole history, this turn's answer included."""
        return self.prompt.length + len(self.answer.ids)

    def bytes(self) -> int:
        """What it takes: its arrays, and its messages as JSON."""
        arrays: list[NDArray[Any]] = [self.prompt.ids, self.answer.ids, self.answer.logprobs, self.answer.versions]
        if (rows := self.answer.rows) is not None:
            arrays += [rows.experts, rows.provenance, rows.version]
        texts = [message.raw for message in (*self.prompt.appended, self.answer.message)]
        return sum(array.nbytes for array in arrays) + len(orjson.dumps(texts))

    def line(self) -> list[Turn]:
        """The turns from the root to this one."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def history(self) -> list[Message]:
        """All messages up to and with this turn's answer, as they are stored."""
        return [message for turn in self.line() for message in (*turn.prompt.appended, turn.answer.message)]

    def rows(self) -> RoutingRecord | None:
        """The rows of this turn's whole history, one for each token but the last; None without routing replay."""
        records = [turn.answer.rows for turn in self.line() if turn.answer.rows is not None]
        return RoutingRecord.concatenate(records) if len(records) == len(self.line()) else None

    def generated(self) -> list[bool]:
        """For each message of `history`, whether it was generated here."""
        return [flag for turn in self.line() for flag in (*(False for _ in turn.prompt.appended), True)]
