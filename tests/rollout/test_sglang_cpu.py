"""Where real SGLang is looked for, and what it is started with; tests/sglang starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pacenote.rollout.launch import ServiceError
from pacenote.rollout.sglang_cpu import cpu_command, find_python


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_named_python_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = executable(tmp_path / "here" / ".venv-sglang" / "bin" / "python")
    named = executable(tmp_path / "named" / "python")
    monkeypatch.chdir(tmp_path / "here")
    assert find_python({}) == here
    assert find_python({"PACENOTE_SGLANG": str(named)}) == named


def test_a_link_stays_one(tmp_path: Path) -> None:
    """A virtual environment's python is a link, and what it links to is another python."""
    real = executable(tmp_path / "usr" / "python")
    link = tmp_path / "python"
    link.symlink_to(real)
    assert find_python({"PACENOTE_SGLANG": str(link)}) == link


@pytest.mark.parametrize("kind", ["nothing", "a folder", "no program"])
def test_what_is_no_python_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """Even where a .venv-sglang stands: who names one means it."""
    place = tmp_path / "python"
    if kind == "a folder":
        place.mkdir()
    elif kind == "no program":
        place.write_text("")
    with pytest.raises(ServiceError, match=rf"PACENOTE_SGLANG={place}, found none.*scripts/install_sglang.py"):
        find_python({"PACENOTE_SGLANG": str(place)})


def test_roles(tmp_path: Path) -> None:
    def words(**options: object) -> list[str]:
        return cpu_command(tmp_path / "python", tmp_path, port=1, **options)  # type: ignore[arg-type]

    assert "--disaggregation-mode" not in words()
    prefill = words(role="prefill", bootstrap_port=8998)
    assert prefill[prefill.index("--disaggregation-mode") + 1] == "prefill"
    assert prefill[prefill.index("--disaggregation-bootstrap-port") + 1] == "8998"
    assert "--disaggregation-bootstrap-port" not in words(role="decode")
    assert all("--enable-return-routed-experts" in words(**one) for one in ({}, {"role": "decode"}))
    for role, port in (("prefill", None), ("decode", 8998), ("regular", 8998)):
        with pytest.raises(ValueError, match=f"bootstrap port for a prefill server only, got {port} for {role}"):
            words(role=role, bootstrap_port=port)
