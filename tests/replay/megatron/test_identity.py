"""Experts that name their tokens: rows that are not where they belong are seen, although every shape is right."""

from __future__ import annotations

import pytest
import torch

from pacenote.kernels.spec import REPLAY
from pacenote.replay.align import align
from pacenote.replay.megatron import attach_megatron
from tests.replay.megatron.single import make

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron"),
]

LAYERS = (1, 2, 3)


def test_rows_flattened_in_the_wrong_order_do_not_meet_their_tokens() -> None:
    """[B, S] against [S, B]: the shapes are equal, so only the identity of tokens tells. `align` has it right."""
    from tests.replay.megatron import drive

    model = make()
    replay = attach_megatron(model)
    drive.hollow([model])
    [ids] = drive.tokens(1)
    rows = torch.stack([drive.encode(ids, layer) for layer in LAYERS], 2).to(torch.uint8)
    batch = drive.sbhd(ids, replay, LAYERS)
    for given, right in ((align(rows, replay.layout, layers=(0, 1, 2)), True), (rows.flatten(0, 1), False)):
        with drive.watched([model]) as identity, replay.rows([given]):
            model(**batch.inputs)
        assert identity.compared == 3 * ids.numel()
        assert (identity.wrong == 0) == right


def test_rows_by_ordinal_instead_of_by_layer_do_not_meet_their_layers() -> None:
    """Dense layers first: the place of a layer in the rows is not its number."""
    from tests.replay.megatron import drive

    model = make()
    replay = attach_megatron(model)
    drive.hollow([model])
    [ids] = drive.tokens(1)
    rows = torch.stack([drive.encode(ids, layer) for layer in range(5)], 2).to(torch.uint8)  # dense and MTP ones too
    assert replay.places(range(5)) == LAYERS
    for layers, right in ((replay.places(range(5)), True), ((0, 1, 2), False)):
        with drive.watched([model]) as identity, replay.rows([align(rows, replay.layout, layers=layers)]):
            model(**drive.sbhd(ids, replay, LAYERS).inputs)
        assert (identity.wrong == 0) == right


def test_a_padded_packed_batch_meets_its_tokens() -> None:
    from tests.replay.megatron import drive

    model = make()
    replay = attach_megatron(model)
    drive.hollow([model])
    [ids] = drive.tokens(1)
    batch = drive.thd(ids, replay, LAYERS)
    assert batch.rows.padding > 0
    with drive.watched([model]) as identity, replay.rows([batch.rows]):
        model(**batch.inputs).mean().backward()
    real = int((batch.rows.routes.state == REPLAY).sum())
    assert (identity.compared, identity.wrong) == (3 * real, 0)
    assert replay.audit()["pad"].tolist() == [batch.rows.padding] * 3
