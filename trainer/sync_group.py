"""Weights over a process group: broadcasts of this process, rank 0, to the ranks of one engine.

Every engine has a group of its own. In one group of all, the ranks of healthy engines would wait in a broadcast that a
dead one broke until their own timeout, half an hour in SGLang, and nothing that rank 0 does frees them. The price is
that n engines are sent n copies. The groups live as long as a push: an engine that was started again has none.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from torch import Tensor

from pacenote.rollout.embedded_group import WeightGroup, serve_store
from pacenote.trainer.engines import Engine

JOIN_SECONDS = 120.0
Backend = Literal["gloo", "nccl"]


class Link:
    """The group of one engine. What goes wrong is kept in the engine, which is then sent nothing more.

    Args:
        engine: whose ranks are 1, 2, ...
        address: where the engine finds this process.
        backend: of the group; over gloo tensors go through this machine's memory.
        timeout: seconds that a broadcast may take.
    """

    def __init__(self, engine: Engine, *, address: str, backend: Backend, timeout: float) -> None:
        self.engine, self.backend = engine, backend
        self.name = f"pacenote-{uuid.uuid4().hex[:12]}"
        self._group: WeightGroup | None = None
        self._store = [serve_store(address, JOIN_SECONDS)]  # NCCL's ranks meet there only in their first broadcast
        size = 1 + engine.ranks()
        if engine.error is None:
            self._join(address, size, timeout)

    def _join(self, address: str, size: int, timeout: float) -> None:
        port = self._store[0].port
        body = {
            "master_address": address, "master_port": port, "rank_offset": 1, "world_size": size,
            "group_name": self.name, "backend": self.backend,
        }  # fmt: skip

        def ended(future: Future[Any]) -> None:
            if future.exception() is not None or self.engine.error is not None:
                self._store.clear()  # the last reference: who still waits there is freed

        with ThreadPoolExecutor(2) as beside:
            joining = beside.submit(
                WeightGroup, address, port, rank=0, size=size, name=self.name, backend=self.backend,
                timeout=min(timeout, JOIN_SECONDS),
            )  # fmt: skip
            asking = beside.submit(self.engine.post, "init_weights_update_group", body)
            joining.add_done_callback(ended)
            asking.add_done_callback(ended)
            try:
                self._group = joining.result()
            except (RuntimeError, ValueError) as error:
                asking.result()
                self.engine.fail(f"the process group was not made: {str(error).splitlines()[0]}")

    def send(self, named: Sequence[tuple[str, Tensor]], body: dict[str, Any]) -> None:
        """Broadcast tensors [...], in order, while the engine is told what comes: `body` and their names and shapes."""
        group = self._group
        if self.engine.error is not None or group is None:
            return
        told = {
            **body,
            "names": [name for name, _ in named],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
            "shapes": [list(tensor.shape) for _, tensor in named],
            "group_name": self.name,
        }
        with ThreadPoolExecutor(1) as beside:
            answer = beside.submit(self.engine.post, "update_weights_from_distributed", told)
            works = [group.broadcast(self._at_hand(tensor)) for _, tensor in named]
            # One that refuses takes no part, and its broadcasts would only end by their timeout.
            while not answer.done() or (answer.result() and not all(work.is_completed() for work in works)):
                time.sleep(0.001)
        if self.engine.error is None:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                self.engine.fail(f"the broadcast broke: {str(error).splitlines()[0]}")

    def _at_hand(self, tensor: Tensor) -> Tensor:
        return (tensor.detach() if self.backend == "nccl" else tensor.detach().cpu()).contiguous()

    def close(self) -> None:
        """Leave the group, at both ends."""
        self._store.clear()
        group, self._group = self._group, None
        if group is None:
            return
        self.engine.try_post("destroy_weights_update_group", {"group_name": self.name})
        # Beside: after a failure it waits for broadcasts that nobody takes.
        leaving = threading.Thread(target=group.close, name="leave-group", daemon=True)
        leaving.start()
        if self.engine.error is None:
            leaving.join()
