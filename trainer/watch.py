"""What ends the waiting for episodes early."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pacenote.trainer.errors import EngineDied


@dataclass(slots=True)
class Watch:
    """Conditions under which waiting for answers makes no sense any more; checked a few times a second."""

    checks: list[Callable[[], None]] = field(default_factory=list)
    period: float = 0.2
    progress: float = 0.0
    """When an episode last came back whole, by the monotonic clock."""

    def look(self, patience: float = math.inf) -> None:
        """Raise whatever a check raises, or EngineDied once nothing has come for `patience` seconds."""
        for check in self.checks:
            check()
        if time.monotonic() - self.progress > patience:
            raise EngineDied(f"no episode ended for {patience:g} s (--rollout.patience): the engine is stuck")

    async def run(self, patience: float = math.inf) -> None:
        """Look again and again."""
        self.progress = time.monotonic()
        while True:
            self.look(patience)
            await asyncio.sleep(self.period)
