"""base64 by pybase64, which is fifty times as fast; where that is not installed, by Python's own."""

from __future__ import annotations

import base64

try:
    import pybase64
except ImportError:  # a machine that holds torch and triton and nothing else of ours
    pybase64 = None  # type: ignore[assignment]


def encode(data: bytes) -> str:
    """The text of some bytes."""
    return base64.b64encode(data).decode("ascii") if pybase64 is None else str(pybase64.b64encode_as_string(data))


def decode(text: str | bytes) -> bytes:
    """The bytes of a text, which must be base64 from its first character to its last.

    Raises:
        ValueError: it is not.
    """
    return base64.b64decode(text, validate=True) if pybase64 is None else bytes(pybase64.b64decode(text, validate=True))
