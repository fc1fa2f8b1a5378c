"""One turn as the journal keeps it: a JSON head, and its arrays as safetensors. No pickle.

The head names every field. A field that is not there when it is read has its class's default, so an older journal can
be read; fields beyond those below are kept as JSON if their class has them. Legend: A tokens appended, G generated, R
rows, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pacenote.replay.record import RoutingRecord
from pacenote.rollout.messages import Message, parse_message
from pacenote.rollout.session import Pending
from pacenote.rollout.turn import Answer, Prompt, Render, Turn

Head = dict[str, Any]
Arrays = dict[str, NDArray[Any]]
Kind = TypeVar("Kind", Pending, Prompt, Render, Answer)


def pack_turn(pending: Pending, answer: Answer, *, id: str, created: float) -> tuple[str, bytes]:
    """(head, arrays) of a turn that is about to be committed.

    Arrays: `prompt.ids` [A] int32; `answer.ids` [G] int32, `answer.logprobs` [G] float32, `answer.versions` [G] int32;
    with routes `rows.experts` [R, L, K] uint8 | uint16, `rows.provenance` [R] uint8, `rows.version` [R] int32.

    Raises:
        TypeError: a field that is no JSON, or JSON that is nested too deeply.
    """
    prompt, rows = pending.prompt, answer.rows
    arrays: Arrays = {
        "prompt.ids": prompt.ids,
        "answer.ids": answer.ids,
        "answer.logprobs": answer.logprobs,
        "answer.versions": answer.versions,
    }
    if rows is not None:
        arrays |= {f"rows.{name}": getattr(rows, name) for name in ("experts", "provenance", "version")}
    head = {
        "id": id,
        "created": created,
        "pending": _others(pending, "prompt", "rivals") | {"rivals": [turn.number for turn in pending.rivals]},
        "prompt": _others(prompt, "parent", "appended", "ids", "path", "render")
        | {
            "parent": None if prompt.parent is None else prompt.parent.number,
            "appended": [_message(message) for message in prompt.appended],
            "path": prompt.path.hex(),
        },
        "render": _others(prompt.render, "digest") | {"digest": prompt.render.digest.hex()},
        "answer": _others(answer, "message", "ids", "logprobs", "versions", "rows")
        | {"message": _message(answer.message)},
        "rows": None if rows is None else {"layers": rows.layers, "num_experts": rows.num_experts},
    }
    text = orjson.dumps(head).decode()
    return text, bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def unpack_turn(head: str, arrays: bytes, turns: Sequence[Turn]) -> tuple[Pending, Answer, str, float]:
    """(pending, answer, id, created), as they were given to `pack_turn`.

    Args:
        head, arrays: from `pack_turn`.
        turns: the session's earlier turns, by number.

    Raises:
        BadRequest, KeyError, IndexError, TypeError, ValueError, SafetensorError: not what `pack_turn` wrote.
    """
    body, found = orjson.loads(head), load(arrays)
    prompt, message = body["prompt"], _restored(body["answer"]["message"])
    parent = prompt["parent"]
    render = _made(Render, body["render"], digest=bytes.fromhex(body["render"]["digest"]))
    made = _made(
        Prompt,
        prompt,
        parent=None if parent is None else turns[parent],
        appended=tuple(_restored(entry) for entry in prompt["appended"]),
        ids=found["prompt.ids"],
        spans=tuple((role, count) for role, count in prompt["spans"]),
        path=bytes.fromhex(prompt["path"]),
        render=render,
    )
    rivals = tuple(turns[number] for number in body["pending"]["rivals"])
    answer = _made(
        Answer,
        body["answer"],
        message=message,
        ids=found["answer.ids"],
        logprobs=found["answer.logprobs"],
        versions=found["answer.versions"],
        rows=_rows(body["rows"], found),
    )
    return _made(Pending, body["pending"], prompt=made, rivals=rivals), answer, body["id"], body["created"]


def _rows(head: Mapping[str, Any] | None, found: Mapping[str, NDArray[Any]]) -> RoutingRecord | None:
    if head is None:
        return None
    return RoutingRecord(
        experts=found["rows.experts"],
        provenance=found["rows.provenance"],
        version=found["rows.version"],
        layers=tuple(head["layers"]),
        num_experts=head["num_experts"],
    )


def _message(message: Message) -> Head:
    """A message as it came; the rest follows from it, but for the key, which depends on how messages are matched."""
    return {"raw": message.raw, "key": message.key.hex()}


def _restored(entry: Mapping[str, Any]) -> Message:
    return replace(parse_message(entry["raw"], "a message in the journal"), key=bytes.fromhex(entry["key"]))


def _others(value: Pending | Prompt | Render | Answer, *known: str) -> Head:
    """The fields that are JSON as they are."""
    return {field.name: getattr(value, field.name) for field in fields(value) if field.init and field.name not in known}


def _made(kind: type[Kind], head: Mapping[str, Any], **known: Any) -> Kind:
    """An instance of a head's fields, the known ones replaced."""
    names = {field.name for field in fields(kind) if field.init}
    return kind(**({name: value for name, value in head.items() if name in names} | known))
