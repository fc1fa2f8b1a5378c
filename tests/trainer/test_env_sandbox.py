"""Programs that nobody has read: what each limit holds, with and without namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pacenote.trainer.environments import code
from pacenote.trainer.environments.leash import CannotStart, Leash
from pacenote.trainer.environments.sandbox import Limits, Sandbox

LIMITS = Limits(seconds=10, cpu=2, memory=256 << 20, output=1 << 16, processes=8)


@pytest.fixture(params=[True, False], ids=["namespaces", "limits"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(limits=LIMITS, namespaces=request.param)


def hasty(sandbox: Sandbox, seconds: float = 1.0) -> Sandbox:
    return Sandbox(limits=Limits(seconds=seconds, processes=8), namespaces=sandbox.namespaces)


def running(mark: str) -> list[str]:
    """Processes with `mark` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_says_what_a_program_did(sandbox: Sandbox) -> None:
    done = sandbox.python("import sys; print(input()[::-1]); print('e', file=sys.stderr); sys.exit(3)", stdin="äb\n")
    assert (done.code, done.stdout, done.stderr, done.truncated) == (3, "bä\n", "e\n", False)


def test_nothing_is_inherited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    source = """
import os
print(sorted(os.environ), os.listdir("."), len(os.listdir("/proc/self/fd")), os.getsid(0) == os.getpid())
"""
    said = sandbox.python(source).stdout
    assert (
        said.replace("'LC_CTYPE'", "") == "[] ['program.py'] 4 True\n"
    )  # python sets LC_CTYPE; one is the listing's own
    os.close(reader)
    os.close(writer)


def test_python_is_this_one(sandbox: Sandbox) -> None:
    assert sandbox.python("import os; print(os.__file__)").stdout.strip() == os.__file__


def test_output_is_bounded(sandbox: Sandbox) -> None:
    done = sandbox.python("while True: print('x' * 999)")
    assert done.truncated
    assert len(done.stdout) <= LIMITS.output


def test_memory_is_bounded(sandbox: Sandbox) -> None:
    assert "MemoryError" in sandbox.python("bytearray(1 << 30)").stderr


def test_files_are_bounded(sandbox: Sandbox) -> None:
    assert "File too large" in sandbox.python("open('big', 'wb').write(bytes(1 << 20))").stderr


def test_cpu_is_bounded(sandbox: Sandbox) -> None:
    done = Sandbox(limits=Limits(seconds=60, cpu=1), namespaces=sandbox.namespaces).python("while True: pass")
    assert done.code in (-9, -24)


def test_sleep_is_bounded(sandbox: Sandbox) -> None:
    assert hasty(sandbox).python("import time; time.sleep(99)").code is None


def test_processes_are_bounded(sandbox: Sandbox) -> None:
    source = """
import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0:
            time.sleep(99)
        made += 1
except OSError:
    pass
print(made)
"""
    done = sandbox.python(source)
    assert 0 < int(done.stdout) < 100


def test_fork_bomb_leaves_nothing(sandbox: Sandbox) -> None:
    mark = uuid.uuid4().hex
    source = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    assert hasty(sandbox).run([sys.executable, "-I", "-c", source, mark], {}).code is None
    assert running(mark) == []


@pytest.mark.parametrize("ends", [True, False])
def test_children_that_leave_are_found(sandbox: Sandbox, ends: bool) -> None:
    mark = uuid.uuid4().hex
    source = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(99)
else:
    time.sleep({0 if ends else 99})
"""
    assert hasty(sandbox, 2.0).run([sys.executable, "-I", "-c", source, mark], {}).code == (0 if ends else None)
    assert running(mark) == []


def test_walls_that_stand_hold(tmp_path: Path) -> None:
    probe = f"""
import os
for name, act in (("network", lambda: __import__("socket").create_connection(("127.0.0.1", 9), 1)),
                  ("files", lambda: open({str(tmp_path / "out")!r}, "w")),
                  ("processes", lambda: os.kill({os.getpid()}, 0))):
    try:
        act(); print(name, "open")
    except OSError as error:
        print(name, error.errno)
"""
    tmp_path.chmod(0o777)
    done = Sandbox(limits=LIMITS).python(probe)
    held = dict(line.split() for line in done.stdout.splitlines())
    expected = {"network": "101", "files": "30", "processes": "3"}  # ENETUNREACH, EROFS, ESRCH
    assert {name: held[name] for name in done.walls if name in expected} == {
        name: errno for name, errno in expected.items() if name in done.walls
    }


def test_leash_says_how_it_ended(tmp_path: Path) -> None:
    def word(*command: str, seconds: float | None = None) -> str:
        with Leash() as leash:
            subprocess.run(leash.command(command, seconds=seconds), pass_fds=[leash.fd], check=True)
            return leash.word()

    assert word("true") == "exit 0"
    assert word("sh", "-c", "exit 7") == "exit 7"
    assert word("sh", "-c", "kill -15 $$") == "signal 15"
    assert word("sleep", "99", seconds=0.1) == "time"
    with pytest.raises(CannotStart, match="No such file"):
        word(str(tmp_path / "none"))


def test_letting_go_kills() -> None:
    with Leash() as leash:
        process = subprocess.Popen(leash.command(["sleep", "99"], seconds=None), pass_fds=[leash.fd])
        leash.release()
        assert process.wait(30) == 0


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "worth"),
    [("```python\nprint(int(input()) + 1)\n```", 1.0), ("```\nprint(2)\n```", 0.0), ("print(2)", 0.0),
     ("```python\nprint(9)\n```\nor\n```python\nprint(int(input()) + 1)\n```", 1.0),
     ("```python\nprint(int(input()) + 1)", 0.0), ("```python\nraise SystemExit(1)\n```", 0.0)],
)  # fmt: skip
def test_code_by_cases(text: str, worth: float) -> None:
    cases = [{"stdin": "1\n", "stdout": "2"}, {"stdin": "4\n", "stdout": "5\n"}]
    assert code.passed(answer(text), {"cases": cases}) == worth


@pytest.mark.parametrize(
    ("source", "worth"), [("def f(x): return 2 * x", 1.0), ("def f(x): return x", 0.0), ("import os; os._exit(0)", 0.0)]
)
def test_code_by_asserts(source: str, worth: float) -> None:
    label = {"asserts": ["assert f(2) == 4", "assert f(0) == 0"]}
    assert code.passed(answer(f"```python\n{source}\n```"), label) == worth


@pytest.mark.parametrize(
    "label", [None, {}, {"cases": []}, {"cases": [{"stdin": "1"}]}, {"asserts": "assert ("}, {"asserts": []},
              {"cases": [{"stdin": "", "stdout": ""}], "asserts": "x"}],
)  # fmt: skip
def test_code_labels(label: object) -> None:
    with pytest.raises(ValueError, match="code expects"):
        code.check_label(label)
    assert code.passed(answer("```\n1\n```"), label) is None
