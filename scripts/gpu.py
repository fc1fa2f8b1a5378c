"""The kernels on a GPU: their tests against the definition, then the benchmarks as JSON. Standard library only.

    PYTHON=/path/to/python make gpu OUT=somewhere

For a machine that may have no network: the python that runs this needs a CUDA (or ROCm) torch, and is used as it is.
With pytest, the tests of tests/kernels run, those with hypothesis if that is there too; without pytest, the named
checks of tests/kernels/route_checks.py. At most ten minutes.

Exit status: 0 if all that could run held, 1 if something failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 570
TESTS_SECONDS = 300
NOT_ON_A_GPU = ("test_aot.py", "test_mutants.py", "test_interpreter.py")
PROBE = """
import sys
try:
    import torch, triton
except ImportError as error:
    sys.exit(f"expected a python with a CUDA torch and triton, got {error}")
if not torch.cuda.is_available():
    sys.exit(f"expected a GPU, torch {torch.__version__} sees none")
print(torch.cuda.get_device_name(), "| torch", torch.__version__, "| triton", triton.__version__)
"""


def environment() -> dict[str, str]:
    """This process's environment with the sources on the path and the interpreter of Triton off."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(ROOT / "src"), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}


def run(title: str, words: list[str], seconds: float) -> bool:
    """Run python with these words; True if it succeeded in time."""
    print(f"gpu: {title}: {' '.join(words)}", flush=True)
    start = time.monotonic()
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), check=False, timeout=seconds)
        held = done.returncode == 0
    except subprocess.TimeoutExpired:
        print(f"gpu: {title}: stopped after {seconds:.0f} s", flush=True)
        held = False
    print(f"gpu: {title}: {'held' if held else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return held


def has(module: str) -> bool:
    """Whether this python can import a module."""
    return importlib.util.find_spec(module) is not None


def tests() -> list[str]:
    """What to run as tests here; says what cannot run."""
    if not has("pytest"):
        print("gpu: no pytest in this python: running the named checks of routing replay only", flush=True)
        return ["-m", "tests.kernels.route_checks"]
    folder = ROOT / "tests" / "kernels"
    skipped = set(NOT_ON_A_GPU)
    if not has("hypothesis"):
        missing = {path.name for path in folder.glob("test_*.py") if "hypothesis import" in path.read_text("utf-8")}
        print(f"gpu: no hypothesis in this python: left out {', '.join(sorted(missing))}", flush=True)
        skipped |= missing
    ignored = [f"--ignore=tests/kernels/{name}" for name in sorted(skipped)]
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", *ignored]


def main() -> int:
    """Test, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    out = parser.parse_args().out.resolve()
    end = time.monotonic() + SECONDS
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment(), capture_output=True, text=True, check=False
    )
    if probe.returncode:
        print(f"gpu: {(probe.stderr.strip() or 'the probe of torch failed').splitlines()[-1]}; nothing was run")
        return 2
    print(f"gpu: {probe.stdout.strip()}", flush=True)
    held = run("tests", tests(), TESTS_SECONDS)
    # Measured even if a test failed: the benchmark compares its own results before it times anything.
    measured = run("benchmark", ["-m", "benchmarks.route", "--out", str(out)], end - time.monotonic())
    return 0 if held and measured else 1


if __name__ == "__main__":
    sys.exit(main())
