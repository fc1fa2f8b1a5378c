"""Tools that the tests offer."""

from __future__ import annotations

import asyncio
import time


def add(a: int, b: int = 1) -> int:
    """Sum."""
    return a + b


async def meet(name: str) -> str:
    """Wait for another call of the same answer."""
    _met.append(name)
    while len(_met) < 2:
        await asyncio.sleep(0.001)
    return name


def slow() -> None:
    """Longer than allowed."""
    time.sleep(1)


def fail() -> None:
    """Raise."""
    raise KeyError("k")


_met: list[str] = []
TOOLS = {"add": add, "meet": meet, "slow": slow, "fail": fail}
