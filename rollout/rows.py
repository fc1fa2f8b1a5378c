"""The routing rows of one answer: decoded, and proven where the engine sent rows that the session holds already.

A session asks for the rows that it lacks. An engine that ignores that sends all of them; then the rows at the overlap
are held against those that the session has. Both SGLang's and vLLM's payloads are read. Legend: P prompt tokens,
G generated tokens, H rows held, L MoE layers, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pacenote.replay.errors import PayloadError
from pacenote.replay.record import CACHED, DECODE, MISSING, PREFILL, RECOMPUTED, RoutingRecord
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.vllm import decode_vllm
from pacenote.replay.wire import decode_sglang
from pacenote.rollout.turn import Prompt

_NUMPY = b"k05VTVBZ"  # base64 of the six bytes that every numpy file starts with


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What an answer brings.

    Attributes:
        record: P + G - 1 - H rows, the first of them row H.
        compared: rows that the session held and got again under the same weight version.
        differing: those of them whose experts differ.
        note: in words, if rows came that were not asked for or not equal.
    """

    record: RoutingRecord
    compared: int = 0
    differing: int = 0
    note: str | None = None


def read_rows(
    payload: str | bytes,
    prompt: Prompt,
    geometry: RoutingGeometry,
    *,
    versions: NDArray[np.int32],
    cached: int,
    start: int,
    recomputed: int = 0,
) -> Rows:
    """The rows of one answer.

    Args:
        payload: base64 text, as text or bytes: SGLang's int32, or vLLM's numpy file.
        prompt: what was asked.
        geometry: the model's.
        versions: [G] int32, weight version of each generated token.
        cached: prompt tokens that the engine took from its cache.
        start: the row from which on rows were asked for: H or less.
        recomputed: rows below this one were computed anew by the last version, after others had sampled their tokens.

    Raises:
        PayloadError: neither the rows that were asked for nor all of them, an expert that the model does not have, or
            held rows that came back as another prefix's.
    """
    try:
        record = _decode(payload, prompt, geometry, versions, cached, start, recomputed)
    except PayloadError as error:
        if not start:
            raise
        try:
            record = _decode(payload, prompt, geometry, versions, cached, 0, recomputed)
        except PayloadError:
            raise error from None
        return _prove(record, prompt, 0, "the engine sent all rows again")
    return Rows(record=record) if start == prompt.rows_held else _prove(record, prompt, start, None)


def _decode(
    payload: str | bytes,
    prompt: Prompt,
    geometry: RoutingGeometry,
    versions: NDArray[np.int32],
    cached: int,
    start: int,
    recomputed: int,
) -> RoutingRecord:
    """Rows from `start` to the last but one token."""
    places = np.arange(start, prompt.length + len(versions) - 1)
    provenance = np.where(places < prompt.length, PREFILL, DECODE)
    provenance = np.where(places < min(cached, prompt.length), CACHED, provenance).astype(np.uint8)
    # A generated token's own row is computed when the next token is.
    writers = np.concatenate([np.repeat(versions[:1], prompt.length), versions[1:]])
    writers[:recomputed] = versions[-1]
    provenance[places < recomputed] = RECOMPUTED
    head = payload[: len(_NUMPY)] if isinstance(payload, str | bytes) else None
    decode = decode_vllm if head in (_NUMPY, _NUMPY.decode()) else decode_sglang
    record = decode(payload, geometry, rows=len(places), provenance=provenance, version=writers[places])
    _check_there(record, start, prompt.length)
    return record


def _check_there(record: RoutingRecord, start: int, prompt_length: int) -> None:
    """A token's experts are distinct, so what is zero in every layer was never written."""
    if record.top_k < 2:
        return
    lost = np.flatnonzero(~record.experts.reshape(record.rows, -1).any(axis=1)) + start
    if len(lost):
        side = "prompt" if lost[0] < prompt_length else "answer"
        raise PayloadError(
            f"expected experts for every token, got zeros in every layer for {len(lost)} of {record.rows} tokens, "
            f"first for token {lost[0]}, of the {side}: a prefill/decode pair behind a gateway has no rows of the "
            "prompt (use --pair), and a host cache (HiCache) loses those of cached prefixes (switch it off)"
        )


def _prove(record: RoutingRecord, prompt: Prompt, start: int, note: str | None) -> Rows:
    """Hold the first rows of `record`, whose first is row `start`, against those that the session has; keep the rest.

    Engines round, so a token that was computed anew may be routed otherwise in a few layers. Rows of another prefix, or
    rows that are shifted, differ in most.
    """
    held = prompt.parent.rows() if prompt.parent else None
    if held is None:
        return Rows(record=record, note=note)
    count = held.rows - start
    mine, theirs = held.slice(start, held.rows), record.slice(0, count)
    known = (mine.provenance != MISSING) & (mine.version == theirs.version)
    other = (np.sort(mine.experts[known], axis=2) != np.sort(theirs.experts[known], axis=2)).any(axis=2)
    compared, differing = len(other), int(other.any(axis=1).sum())
    if 2 * int(other.sum()) > other.size:
        first = start + int(np.flatnonzero(known)[other.any(axis=1)][0])
        raise PayloadError(
            f"expected the {count} rows that the session holds to come back as they were, got {differing} of "
            f"{compared} that differ, row {first} first: the engine's rows belong to another prefix"
        )
    notes = [note] if note else []
    if differing:
        notes.append(f"{differing} of {compared} rows came back with other experts; those that were held stay")
    elif count and not compared:
        notes.append(f"none of the {count} rows that were held is of the same weight version, so none was compared")
    # A copy: a slice would keep the whole history's rows alive with every turn.
    new = record.slice(count, record.rows)
    fresh = RoutingRecord(
        experts=new.experts.copy(),
        provenance=new.provenance.copy(),
        version=new.version.copy(),
        layers=new.layers,
        num_experts=new.num_experts,
    )
    return Rows(record=fresh, compared=compared, differing=differing, note="; ".join(notes) or None)
