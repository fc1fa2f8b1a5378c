"""base64 with and without pybase64: the same texts, the same refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.replay import base64


@pytest.mark.parametrize("fast", [True, False])
@given(data=st.binary(max_size=200))
def test_there_and_back(fast: bool, data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not fast:
            patch.setattr(base64, "pybase64", None)
        text = base64.encode(data)
        assert base64.decode(text) == base64.decode(text.encode()) == data
    assert base64.encode(data) == text


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("text", ["AAA", "AA=A", "AAA!", "é===", "AAAA\n", "=AAA", b"\xff\xff\xff\xff"])
def test_what_is_none(fast: bool, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(base64, "pybase64", None)
    with pytest.raises(ValueError, match=r"."):
        base64.decode(text)
