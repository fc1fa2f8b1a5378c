"""Names that can be imported: what SGLang imports on its way up and never uses for a text model on a CPU.

Whoever calls one gets an error that says so, instead of a wrong number.
"""

from __future__ import annotations

from typing import NoReturn


class Absent:
    """Something that is not here, `name` in full: it can be imported from, read and inherited from, but not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)  # what Python itself asks of an object
        return Absent(f"{self._name}.{name}")

    def __call__(self, *args: object, **words: object) -> NoReturn:
        raise NotImplementedError(f"{self._name} is not there: SGLang on a CPU has a stand-in for its package")

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[()]:
        return ()
