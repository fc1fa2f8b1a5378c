"""A process group for weights, beside whatever other groups a process is in: the engine's end and the trainer's.

Made as SGLang makes its own (`init_custom_process_group` of srt/utils/common.py, 0.5.23), so that either end may be
SGLang's: the keys by which ranks find each other are those of torch's own helper.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_dist: Any = dist  # what of both is needed here has no types
_c10d: Any = dist.distributed_c10d


class WeightGroup:
    """This process's place in a group; rank 0 sends.

    Args:
        address, port: of the store at which the ranks meet; somebody has to serve it (`serve_store`).
        rank, size: of this process, and of the group.
        name: the same on all ranks, and new to this process.
        backend: "gloo" or "nccl".
        timeout: seconds to wait for the others, here and in every broadcast.

    Raises:
        RuntimeError: the others did not come, the store went away, or there is no such back end here.
        ValueError: the name is taken, or the rank is not one of the group.
    """

    def __init__(
        self, address: str, port: int, *, rank: int, size: int, name: str, backend: str, timeout: float
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"expected a rank in [0, {size}), got {rank}")
        self.backend = backend
        wait = timedelta(seconds=timeout)
        store = _dist.TCPStore(address, port, size, is_master=False, timeout=wait)
        self._group, _ = _c10d._new_process_group_helper(
            size, rank, [], _c10d.Backend(backend), _c10d.PrefixStore(name, store), group_name=name, timeout=wait
        )
        _c10d._world.pg_group_ranks[self._group] = {place: place for place in range(size)}

    def broadcast(self, tensor: torch.Tensor) -> dist.Work:
        """Start the broadcast of rank 0's tensor [...]; on the other ranks `tensor` is written."""
        work: dist.Work = self._group.broadcast(tensor, 0)
        return work

    def close(self) -> None:
        """Leave. Waits for broadcasts that are under way, at most `timeout`."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)


def serve_store(address: str, timeout: float) -> Any:
    """A store at which ranks meet, on a free `port` of this machine; it closes, and frees who waits, once dropped."""
    return _dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
