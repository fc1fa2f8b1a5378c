"""Watching a function without changing what it does."""

from __future__ import annotations

from typing import Any

import pytest


def spy(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a module's function from now on."""
    seen: list[tuple[Any, ...]] = []
    function = getattr(module, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, watched)
    return seen
