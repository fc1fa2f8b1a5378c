"""How deep JSON is nested, held against the parsed value; the limits on one request."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pacenote.rollout.nesting import is_deeper

TEXT = st.text(st.sampled_from('a"\\[]{}:, \n\u00e9\0'), max_size=12)
VALUE = st.recursive(
    TEXT | st.none() | st.integers(-(2**63 - 1), 2**63),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=20,
)


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0)


@given(VALUE, st.booleans())
@example('\\" [[[', True)
@example({"a\\": [['\\\\" {']]}, True)
@example(["\\" * 7, ["[" * 9]], True)
@example(["\\" * 8, ["\\" * 9 + '"' + "[" * 9]], True)
def test_as_deep_as_it_is(value: Any, spaced: bool) -> None:
    raw = json.dumps(value, indent=1).encode() if spaced else orjson.dumps(value)
    found = depth(value)
    assert not is_deeper(raw, found)
    if found:
        assert is_deeper(raw, found - 1)


@given(st.integers(1, 400), st.integers(1, 400), TEXT)
def test_where_it_starts(deep: int, levels: int, text: str) -> None:
    """Beside more brackets in a string than the limit, and after any number of shallow values."""
    quoted = orjson.dumps(text + "[" * 500)
    raw = b"[[],{}," + quoted + b"," + b"[" * deep + quoted + b"]" * deep + b"]"
    assert is_deeper(raw, levels) == (deep + 1 > levels)


@pytest.mark.parametrize("raw", [b"", b"\\", b'"', b'\\"', b"]]]]", b"[" * 200, b'"' * 9, b"\xff[" * 300])
def test_what_is_no_json_raises_nothing(raw: bytes) -> None:
    is_deeper(raw, 100)
