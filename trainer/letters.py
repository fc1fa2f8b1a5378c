"""The tiny task: write letters or signs, as the user asked, then again as the tool asked.

Turn one: the user names a kind of character, "letters" or "signs". Whatever the assistant writes is the query of a
tool, whose result names a kind again, drawn independently. Turn two answers that. A turn is worth the share of its
characters that are of the kind just named. A random policy earns about a half from the first step on, so the signal is
dense, and a policy that ignores the messages cannot beat a half; both must be read. Text alone decides: no token ids.
"""

from __future__ import annotations

import random

from pacenote.trainer.tasks import Chat, Message, Task

KINDS = ("letters", "signs")
ASK = ("Reply with {}", "Please write {}", "Write {}", "Now {}")
SHORTEST = 3  # characters: a shorter turn cannot earn full marks, so stopping at once does not pay


def make_tasks(*, seed: int, step: int, count: int) -> list[Task]:
    """`count` tasks of a step; the label holds the kind of each turn and the tool's words."""
    rng = random.Random(f"letters/{seed}/{step}")
    tasks = []
    for _ in range(count):
        first, second = rng.choice(KINDS), rng.choice(KINDS)
        label = {"first": first, "second": second, "tool": rng.choice(ASK).format(second)}
        tasks.append(Task(messages=[{"role": "user", "content": rng.choice(ASK).format(first)}], label=label))
    return tasks


async def play(chat: Chat, task: Task) -> list[Message]:
    """Environment: user, assistant, tool, assistant."""
    first = await chat(task.messages)
    messages = [*task.messages, first, {"role": "tool", "tool_call_id": "ask", "content": task.label["tool"]}]
    return [*messages, await chat(messages)]


def reward(messages: list[Message], label: dict[str, str]) -> float:
    """Mean over both assistant turns of the share of characters (spaces aside) of the kind named, in [0, 1]."""
    turns = [message.get("content") or "" for message in messages if message["role"] == "assistant"]
    return 0.5 * share(turns[0], label["first"]) + 0.5 * share(turns[1], label["second"])


def share(text: str, kind: str) -> float:
    """Share of the non-space characters of `text` that are letters (or that are not), of at least SHORTEST."""
    characters = [character for character in text if not character.isspace()]
    right = sum(character.isalpha() == (kind == "letters") for character in characters)
    return right / max(len(characters), SHORTEST)
