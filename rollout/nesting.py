"""How deep a JSON text is nested, from its bytes: nothing is parsed, and nothing recurses.

What later walks a request (templates, encoders, digests) recurses, and gives up at depths that differ; a parser alone
would take a thousand levels.
"""

from __future__ import annotations

import numpy as np

_QUOTE, _BACKSLASH, _SPACE, _BRACE = ord('"'), ord("\\"), ord(" "), ord("{")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = np.zeros(256, dtype=np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_RUN = 8  # backslashes in a row; where there are more a slower way is taken


def is_deeper(raw: bytes, levels: int) -> bool:
    """Whether lists and objects of a JSON text are nested more than `levels` deep. Brackets inside strings count for
    nothing. Of a text that is no JSON the answer means nothing; none raises.
    """
    text = np.frombuffer(raw, dtype=np.uint8)
    if int(np.count_nonzero(text | 0x20 == _BRACE)) <= levels:  # "[" is "{" without this bit
        return False
    outside = b"".join(_plainly_quoted(raw).split(b'"')[::2])
    steps = _STEP[np.frombuffer(outside.translate(None, _OTHERS), dtype=np.uint8)]
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0)) > levels


def _plainly_quoted(raw: bytes) -> bytes | bytearray:
    """The text without quotes inside of strings: a quote after an odd number of backslashes is one."""
    if b"\\" not in raw:
        return raw
    text = np.frombuffer(raw, dtype=np.uint8)
    quotes = np.flatnonzero(text == _QUOTE)
    inside, before = np.zeros(len(quotes), dtype=bool), np.arange(len(quotes))
    for back in range(1, _RUN + 1):  # `before`: those with so many backslashes before them
        before = before[text[quotes[before] - back] == _BACKSLASH]
        inside[before] ^= True
        if not len(before):
            break
    else:
        return raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    plain = bytearray(raw)
    np.frombuffer(plain, dtype=np.uint8)[quotes[inside]] = _SPACE
    return plain
