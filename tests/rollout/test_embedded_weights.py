"""The embedded engine's weight session, in-process: order, bad input, and pickles that are not tensors."""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pacenote.rollout.embedded_engine import Engine, UpdateResult
from pacenote.rollout.embedded_model import Runner
from pacenote.rollout.embedded_protocol import DistributedBody, GroupBody, TensorBody
from pacenote.rollout.embedded_weights import WeightUpdates, read_tensors
from pacenote.trainer.sync import shared

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def engine(tiny_dir: Path) -> Iterator[Engine]:
    engine = Engine(Runner(tiny_dir, dtype="float32", slots=2, context_length=32), weight_version="0")
    engine.start()
    yield engine
    engine.stop()


def head(engine: Engine) -> torch.Tensor:
    weight: torch.Tensor = engine.runner.model.lm_head.weight
    return weight


def body(name: str, tensor: torch.Tensor, version: str | None = None, **fields: Any) -> TensorBody:
    return TensorBody(serialized_named_tensors=[shared([(name, tensor)])], weight_version=version, **fields)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["begin", "good", "unreadable", "wrong shape", "end"]), max_size=8))
def test_in_any_order(engine: Engine, calls: list[str]) -> None:
    """Weights and version change at an end of a session in which everything was right, and then only."""

    async def run() -> None:
        updates, opened, staged, whole = WeightUpdates(engine), False, 0, True
        for number, call in enumerate(calls):
            before, name = head(engine).clone(), f"{number}"
            if call == "begin":
                expected, result = not opened, updates.begin()
                if not opened:
                    opened, staged, whole = True, 0, True
            elif call == "end":
                expected, result = opened and whole, await updates.end()
                if expected and staged:
                    assert sorted(set(head(engine).flatten().tolist())) == [float(staged)]
                    assert engine.weight_version == str(staged - 1)
                    before = head(engine).clone()
                opened = False
            elif call == "unreadable":
                expected = False
                result = await updates.tensors(TensorBody(serialized_named_tensors=["AAAA"]))
                whole = False
            else:
                shape = head(engine).shape if call == "good" else (3, 3)
                filled = torch.full(shape, float(number + 1))
                expected, result = opened, await updates.tensors(body(HEAD, filled, name))
                if opened:
                    staged, whole = number + 1, whole and call == "good"
            assert result.success == expected, (call, result.message)
            assert torch.equal(head(engine), before)
        if opened:
            await updates.end()

    asyncio.run(run())


def refused(result: UpdateResult, words: str) -> None:
    assert not result.success
    assert words in result.message


def test_what_is_refused(engine: Engine) -> None:
    async def run() -> None:
        updates = WeightUpdates(engine)
        told = DistributedBody(names=[HEAD], dtypes=["float32"], shapes=[[1]], group_name="nobody")
        refused(await updates.tensors(body(HEAD, torch.zeros(1))), "between begin_weight_update() and end_weight_upd")
        refused(await updates.distributed(told), "must run between begin_weight_update() and end_weight_update()")
        refused(await updates.end(), "no weight-update session is open")
        assert updates.begin().success
        refused(updates.begin(), "already open")
        refused(await updates.distributed(told), "no group 'nobody'")
        refused(await updates.tensors(body(HEAD, torch.zeros(1), load_format="direct")), "load_format='direct' is not")
        two = TensorBody(serialized_named_tensors=["AAAA", "AAAA"])
        refused(await updates.tensors(two), "expected tensors for 1 rank, got 2")
        refused(await updates.end(), "did not come whole, so none of them were taken: no group 'nobody'")
        refused(await updates.leave("nobody"), "does not exist")
        group = GroupBody(master_address="127.0.0.1", master_port=1, rank_offset=2, world_size=2, backend="gloo")
        refused(await updates.join(group), "expected a rank in [0, 2), got 2")

    asyncio.run(run())


def test_shared_memory_is_read_and_copied() -> None:
    tensors = [
        ("a", torch.arange(6.0).reshape(2, 3)),
        ("b", torch.ones(3, dtype=torch.bfloat16)),
        ("c", torch.zeros(0)),
    ]
    found = dict(read_tensors(shared(tensors)))
    for name, tensor in tensors:
        assert torch.equal(found[name], tensor)
    tensors[0][1].fill_(9)
    assert found["a"][0, 0] == 0, "a copy"


def test_memory_outlives_as_many_readers_as_were_asked_for() -> None:
    """It counts them: a payload that three read is gone for the third."""
    held = [("a", torch.arange(6.0))]
    payloads = [shared(held) for _ in range(3)]
    code = (
        "import sys; from pacenote.rollout.embedded_weights import read_tensors\n"
        "for text in sys.argv[1:]: print(read_tensors(text)[0][1].sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code, *payloads], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["15.0"] * 3


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/pacenote-was-here",)


@pytest.mark.parametrize(
    "payload",
    [b"", b"AAAA", pickle.dumps([("a", Evil())]), pickle.dumps([("a", 1)]), pickle.dumps({"a": 1}), pickle.dumps(5)],
)
def test_pickles_of_other_things_are_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="expected serialized_named_tensors"):
        read_tensors(base64.b64encode(payload).decode())
    assert not Path("/tmp/pacenote-was-here").exists()
