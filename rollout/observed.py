"""What there is to say about one answered chat: for metrics, logs and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pacenote.replay.record import MISSING

if TYPE_CHECKING:
    from pacenote.rollout.turn import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """An answered chat. Counts and names only; what was said is in `turns`, for who is asked to show it.

    Attributes:
        session_id: the session.
        turns: the turns that were committed, one a choice.
        engine_seconds: from the first question to the engine until its last answer.
        own_seconds: all the rest: parsing, rendering, reading, writing, the journal.
    """

    session_id: str
    turns: Sequence[Turn]
    engine_seconds: float
    own_seconds: float

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.turns[0].prompt.length

    @property
    def generated_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(turn.answer.ids) for turn in self.turns)

    @property
    def rows(self) -> int:
        """Routing rows that came."""
        return sum(len(turn.answer.rows.provenance) for turn in self.turns if turn.answer.rows is not None)

    @property
    def rows_missing(self) -> int:
        """Of these, rows without experts that could be replayed."""
        records = [turn.answer.rows for turn in self.turns if turn.answer.rows is not None]
        return sum(int((record.provenance == MISSING).sum()) for record in records)

    def fields(self) -> dict[str, Any]:
        """For a line of a log."""
        first = self.turns[0]
        return {
            "session_id": self.session_id,
            "turns": [turn.number for turn in self.turns],
            "parent": None if first.parent is None else first.parent.number,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "rows": self.rows,
            "rows_missing": self.rows_missing,
            "finish": [turn.answer.finish for turn in self.turns],
            "weight_version": self.turns[-1].answer.version_name,
            "engine_ms": round(self.engine_seconds * 1e3, 1),
            "own_ms": round(self.own_seconds * 1e3, 1),
        }

    def content(self) -> dict[str, Any]:
        """What was said: the messages that the request appended, and the answers."""
        return {
            "appended": [message.raw for message in self.turns[0].prompt.appended],
            "answers": [turn.answer.message.raw for turn in self.turns],
        }


Observer = Callable[[Observed], None]


def unobserved(_: Observed) -> None:
    """Nobody looks."""
