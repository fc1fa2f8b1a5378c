"""A session: an append-only tree of turns. No HTTP, no waiting, no lock.

Agents rewrite tails, start over, graft answers from elsewhere and ask twice; each of these is a branch. A request goes
on from the deepest generated answer whose history it starts with. `begin` notes what a request competes with and
changes nothing; `commit` adds the finished turn. Both run to their end at once: any number of chats may be in flight.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pacenote.rollout.messages import Message, chain
from pacenote.rollout.trajectory import Trajectory, join
from pacenote.rollout.turn import Answer, Prompt, Turn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pending:
    """A request on its way: its prompt, and the answers that were there before it and that its own will replace."""

    prompt: Prompt
    rivals: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """A leaf, the numbers of the turns on its line whose answers are trained here, and whether it was superseded."""

    leaf: Turn
    trained: frozenset[int]
    superseded: bool

    def trajectory(self) -> Trajectory:
        """Its arrays."""
        return join(self.leaf, trained=self.trained, status="superseded" if self.superseded else None)


class Session:
    """The turns of one session id.

    Args:
        id: as in the URL.
        recovered: it was started by a chat rather than by POST /sessions.

    Attributes:
        bytes: what its turns take.
    """

    def __init__(self, id: str, *, recovered: bool = False) -> None:
        self.id = id
        self.recovered = recovered
        self.created = time.time()
        self.bytes = 0
        self._turns: list[Turn] = []
        self._by_path: defaultdict[bytes, list[Turn]] = defaultdict(list)
        self._by_prompt: defaultdict[tuple[int, bytes], list[Turn]] = defaultdict(list)
        self._by_id: defaultdict[str, list[Turn]] = defaultdict(list)
        self._superseded: set[int] = set()
        self._abandoned: set[str] = set()
        self._parents: set[int] = set()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns in the order of their commits."""
        return tuple(self._turns)

    @property
    def recovered_from(self) -> int | None:
        """For a session that a chat started: how many messages that chat brought along; what follows was generated."""
        return len(self._turns[0].prompt.appended) if self.recovered and self._turns else None

    def newest(self) -> tuple[Turn, ...]:
        """The answers to the request that was committed last: one, or its n choices; none before the first."""
        return tuple(self._turns[-1 - self._turns[-1].answer.choice :]) if self._turns else ()

    def completion(self, id: str) -> tuple[Turn, ...]:
        """The choices of a completion, as far as they were committed."""
        return tuple(self._by_id.get(id, ()))

    def find(
        self,
        messages: Sequence[Message],
        *,
        reasoning: bool = True,
        among: Collection[Turn] | None = None,
    ) -> Turn | None:
        """The deepest answer whose history, itself included, starts the request; of several the newest that stands.

        Args:
            messages: the request's.
            reasoning: where the request brings reasoning back, it must be the history's; leaving it out is fine.
            among: only these turns; None for all.
        """
        links = chain([message.key for message in messages])
        for count in range(len(messages), 0, -1):
            turns = [
                turn
                for turn in self._by_path.get(links[count], ())
                if (among is None or turn in among) and (not reasoning or _thinks_the_same(turn, messages))
            ]
            if turns:
                return max(turns, key=lambda turn: (not self.superseded(turn), turn.number))
        return None

    def begin(self, prompt: Prompt, *, replaces: Iterable[Turn] = ()) -> Pending:
        """Note the request's rivals: finished answers to the very same prompt, and those that it takes back.

        Args:
            prompt: as rendered.
            replaces: answers that the request takes back although they had another prompt.
        """
        rivals = dict.fromkeys([*self._by_prompt.get(_address(prompt), ()), *replaces])
        return Pending(prompt=prompt, rivals=tuple(rivals))

    def abandon(self, id: str) -> None:
        """Nobody got the answers of this completion, or will: they are rivals of the next to the very same prompt."""
        self._abandoned.add(id)

    def abandoned(self, id: str) -> bool:
        """Whether nobody will get the answers of this completion."""
        return id in self._abandoned

    def settle(self, pending: Pending) -> Pending:
        """A request that is about to be committed, and answers among its rivals that were abandoned since `begin`."""
        found = self._by_prompt.get(_address(pending.prompt), ())
        late = [turn for turn in found if turn.id in self._abandoned and turn not in pending.rivals]
        return replace(pending, rivals=(*pending.rivals, *late)) if late else pending

    def commit(
        self,
        pending: Pending,
        answer: Answer,
        *,
        id: str,
        created: float | None = None,
    ) -> Turn:
        """Add the turn. Its rivals are superseded, unless the agent went on from them.

        Committing the same choice of the same completion again changes nothing. Choices are committed in order, one
        right after the other.

        Args:
            pending: from `begin`.
            answer: checked.
            id: the completion's id.
            created: seconds since the epoch; None is now.

        Returns:
            The turn, as it was committed first.
        """
        prompt, known = pending.prompt, self.completion(id)
        if answer.choice < len(known):
            return known[answer.choice]
        turn = Turn(
            number=len(self._turns),
            id=id,
            prompt=prompt,
            answer=answer,
            path=chain([answer.message.key], prompt.path)[-1],
            created=time.time() if created is None else created,
        )
        self.bytes += turn.bytes()  # first: if its messages cannot be written as JSON, nothing has changed
        self._turns.append(turn)
        self._by_id[id].append(turn)
        self._by_path[turn.path].append(turn)
        self._by_prompt[_address(prompt)].append(turn)
        self._superseded.update(rival.number for rival in pending.rivals)
        if prompt.parent is not None:
            self._parents.add(prompt.parent.number)
        return turn

    def superseded(self, turn: Turn) -> bool:
        """The agent asked again for this answer and did not go on from it."""
        return turn.number in self._superseded and turn.number not in self._parents

    def leaves(self) -> list[Turn]:
        """Turns that nobody went on from, in the order of their commits, superseded ones included."""
        return [turn for turn in self._turns if turn.number not in self._parents]

    def branches(self, *, include_superseded: bool = False) -> list[Branch]:
        """One branch a leaf. Each answer is trained in exactly one of those it is part of, whole if it can be.

        Args:
            include_superseded: also those that end in a superseded answer; they have status "superseded".
        """
        # Commits may go on meanwhile. In this order, whatever is superseded here has its successor in `turns`.
        superseded, turns = frozenset(self._superseded), self.turns
        parents = {turn.parent.number for turn in turns if turn.parent}
        leaves = [
            turn
            for turn in turns
            if turn.number not in parents and (include_superseded or turn.number not in superseded)
        ]
        owner: dict[int, tuple[int, int]] = {}
        for place, leaf in enumerate(leaves):
            drop = 0
            for turn in reversed(leaf.line()):
                # A branch that keeps the answer's stop token is the better owner; then the earliest leaf.
                owner[turn.number] = min(owner.get(turn.number, (drop, place)), (drop, place))
                drop = turn.prompt.drop
        return [
            Branch(
                leaf=leaf,
                trained=frozenset(number for number, (_, at) in owner.items() if at == place),
                superseded=leaf.number in superseded,
            )
            for place, leaf in enumerate(leaves)
        ]

    def trajectories(self, *, include_superseded: bool = False) -> list[Trajectory]:
        """The `branches` as trajectories."""
        return [branch.trajectory() for branch in self.branches(include_superseded=include_superseded)]

    def accumulated_token_ids(self) -> list[int]:
        """Ids of the newest answer's whole history; empty before the first answer."""
        turns = self.turns
        if not turns:
            return []
        turn = turns[-1]
        ids: list[int] = np.concatenate([turn.prompt.token_ids(), turn.answer.ids]).tolist()
        return ids

    def records(self) -> list[dict[str, Any]]:
        """One JSON object a turn: what was appended, what was answered, and how; no logprobs, no routes."""
        return [self._record(turn) for turn in self.turns]

    def _record(self, turn: Turn) -> dict[str, Any]:
        answer = turn.answer
        return {
            "index": turn.number,
            "id": turn.id,
            "choice": answer.choice,
            "parent": turn.parent.number if turn.parent else None,
            "created": turn.created,
            "messages": [message.raw for message in turn.prompt.appended],
            "response": answer.message.raw,
            "finish_reason": answer.finish,
            "status": "superseded" if self.superseded(turn) else "completed",
            "weight_version": answer.version_name,
            "prompt_tokens": turn.prompt.length,
            "completion_tokens": len(answer.ids),
            "rows_compared": answer.rows_compared,
            "rows_differing": answer.rows_differing,
            "note": "; ".join(note for note in (turn.prompt.note, answer.note) if note) or None,
        }


def _address(prompt: Prompt) -> tuple[int, bytes]:
    """Equal for two requests that would send the same tokens from the same turn."""
    return (prompt.parent.number if prompt.parent else -1, prompt.ids.tobytes())


def _thinks_the_same(turn: Turn, messages: Sequence[Message]) -> bool:
    """Where the request brings reasoning back, it is what this turn's history has."""
    return all(
        asked.reasoning is None or asked.reasoning == stored.reasoning
        for asked, stored in zip(messages, turn.history(), strict=False)
    )
