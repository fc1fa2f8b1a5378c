"""Which part of a batch, and which layers, a rank of a parallel trainer holds. No torch: plain arithmetic.

Legend: T positions of the batch, S samples, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A rank's part of a packed batch, as megatron-core cuts it (its docs on context and sequence parallelism).

    Attributes:
        cp_size: context-parallel ranks. Each sample is padded to a multiple of 2 cp_size positions and cut into that
            many chunks; a rank holds chunks cp_rank and 2 cp_size - 1 - cp_rank (zigzag: causal attention balances).
        cp_rank: this rank's number among them.
        sp_size: sequence-parallel ranks (tensor-parallel ones, with that on). Each routes one of sp_size equal runs of
            the context-parallel rank's positions: routes are cut, tokens and masks are not.
        sp_rank: this rank's number among them.

    Raises:
        ValueError: a rank that is not below its size.
    """

    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    sp_rank: int = 0

    def __post_init__(self) -> None:
        """Check the ranks."""
        for axis, rank, size in (("cp", self.cp_rank, self.cp_size), ("sp", self.sp_rank, self.sp_size)):
            if not 0 <= rank < size:
                raise ValueError(f"expected 0 <= {axis}_rank < {axis}_size, got {axis}_rank={rank}, {axis}_size={size}")

    @property
    def sample_multiple(self) -> int:
        """What a sample's positions are padded to a multiple of."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def local_multiple(self, pad_to_multiple: int) -> int:
        """What a rank's positions are padded to a multiple of, so that sequence-parallel ranks get equal runs."""
        return math.lcm(pad_to_multiple, self.sp_size)


def stage_layers(
    moe_layers: Sequence[int],
    num_layers: int,
    *,
    pp_size: int,
    pp_rank: int,
    vpp_size: int = 1,
    vpp_rank: int = 0,
) -> tuple[int, ...]:
    """Places on the rows' L axis of the MoE layers of a pipeline stage, for `pack(layers=...)`.

    Layers are cut into pp_size * vpp_size equal runs; a rank's chunk number v is run v * pp_size + pp_rank, as
    megatron-core interleaves them. Dense layers have no rows and multi-token-prediction layers, numbered from
    `num_layers` on, belong to no run: neither is among the places.

    Args:
        moe_layers: global id of each layer of the rows, ascending (`RoutingRecord.layers`).
        num_layers: decoder layers of the model, dense ones included.
        pp_size: pipeline stages.
        pp_rank: this stage.
        vpp_size: chunks a stage (virtual pipeline).
        vpp_rank: this chunk.

    Raises:
        ValueError: ranks outside their sizes, layers that cannot be cut into equal runs, ids that do not ascend.
    """
    if not (0 <= pp_rank < pp_size and 0 <= vpp_rank < vpp_size):
        raise ValueError(
            f"expected 0 <= rank < size, got pp_rank={pp_rank} of {pp_size} and vpp_rank={vpp_rank} of {vpp_size}"
        )
    if num_layers % (pp_size * vpp_size):
        raise ValueError(
            f"expected layers that divide into {pp_size} x {vpp_size} equal runs, got {num_layers}: for another split "
            "pass pack the places of this stage's layers"
        )
    if list(moe_layers) != sorted(set(moe_layers)):
        raise ValueError(f"expected ascending ids of layers, got {list(moe_layers)}")
    run = num_layers // (pp_size * vpp_size)
    first = (vpp_rank * pp_size + pp_rank) * run
    return tuple(place for place, layer in enumerate(moe_layers) if first <= layer < first + run)
