"""Bounds that a person sets: numbers of at least 1, or none."""

from __future__ import annotations


def at_least_one(**bounds: float | None) -> None:
    """Refuse bounds that would let nothing through.

    Args:
        bounds: by their names as flags have them, with underscores; None is no bound.

    Raises:
        ValueError: one is below 1.
    """
    for name, value in bounds.items():
        if value is not None and value < 1:
            raise ValueError(f"expected {name.replace('_', ' ')} of at least 1, got {value}")
