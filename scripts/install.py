"""Make `.venv` and put pacenote into it, with the torch build that fits this machine. Standard library only.

Where there is no NVIDIA GPU the CPU build of torch is taken if pip can find one (a local wheel, a mirror, an index in
PIP_EXTRA_INDEX_URL), else pip's default build. Where there is a GPU: the default build, which carries CUDA.
A stamp keeps the digest of what was installed, so a second run installs nothing.

    python scripts/install.py            # into .venv
    TORCH=2.11.0 python scripts/install.py
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("VENV", ROOT / ".venv"))
TORCH = os.environ.get("TORCH", "2.13.0")
CLIENTS_IMPORT = (
    "fastuuid", "h2", "importlib-metadata<9", "pydantic-settings", "python-dotenv", "shortuuid", "tenacity", "tiktoken",
    "toml",
)  # fmt: skip

SGLANG = "sglang==0.5.23"
PROTOCOL_IMPORTS = ("ipython", "msgspec", "pybase64")
GATEWAYS = ("smg==1.13.0", "sglang-router==0.3.2", "sglang-router==0.2.1", "sglang-router==0.1.9")


def has_nvidia_gpu() -> bool:
    """True if the driver lists at least one GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def pip(*words: str, check: bool = True) -> bool:
    """Run pip of the environment; True if it succeeded."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *words]
    done = subprocess.run([*command, "--quiet"], check=False, stderr=None if check else subprocess.DEVNULL)
    if check and done.returncode:
        sys.exit(f"install: pip failed on: {' '.join(words)}")
    return done.returncode == 0


def install_gateways() -> None:
    """SGLang's gateways, each release in a folder of its own: they share a module name. Only tests start them."""
    for release in GATEWAYS:
        if not pip("--no-deps", "--target", str(VENV / "gateways" / release), release, check=False):
            print(f"install: {release} could not be installed; tests in front of it will be skipped", flush=True)


def install_protocol() -> None:
    """SGLang's own classes of its HTTP bodies, with what they import; its server is scripts/install_sglang.py's."""
    words = ("--target", str(VENV / "sglang"), "-c", str(ROOT / "constraints-sglang.txt"))
    if not pip("--no-deps", *words, SGLANG, check=False) or not pip(*words, *PROTOCOL_IMPORTS, check=False):
        print(f"install: {SGLANG} could not be installed; the test against its protocol will be skipped", flush=True)


def digest() -> str:
    """Digest of everything that decides what gets installed."""
    text = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "scripts/install.py"))
    return hashlib.sha256(text + f"{TORCH} {sys.version} {ROOT}".encode()).hexdigest()


def install_torch() -> None:
    """The CPU build on a machine without a GPU if pip can find one, else pip's default build."""
    if not has_nvidia_gpu():
        if pip(f"torch=={TORCH}+cpu", check=False):
            return
        print(f"install: no CPU build of torch {TORCH} at hand (name an index that has one in PIP_EXTRA_INDEX_URL);"
              " taking pip's default build, which is large", flush=True)  # fmt: skip
    pip(f"torch=={TORCH}")


def install_megatron() -> None:
    """megatron-core beside what pacenote depends on: only its tests need it, so without it the rest still installs.

    It declares Python 3.12 and a GPU's packages; what replay touches of it runs on 3.11 with what is here already.
    """
    words = ("--no-deps", "--ignore-requires-python", "-c", str(ROOT / "constraints.txt"), "megatron-core")
    if not pip(*words, check=False):
        print("install: megatron-core could not be installed; tests/replay/megatron will be skipped", flush=True)


def install_clients() -> None:
    """litellm and Harbor, whose terminus-2 is the agent of some tests, without which the rest still installs.

    They declare cloud SDKs, a database and, Harbor, Python 3.12; a chat and terminus-2 import only CLIENTS_IMPORT.
    """
    words = ("-c", str(ROOT / "constraints.txt"))
    if not pip(*words, *CLIENTS_IMPORT, check=False) or not pip(
        "--no-deps", "--ignore-requires-python", *words, "litellm", "harbor", check=False
    ):
        print("install: litellm and harbor could not be installed; their tests will be skipped", flush=True)


def install_fuzzer() -> None:
    """atheris, where it has a wheel: from source it needs clang. Only `make fuzz` and its test start it."""
    if not pip("-c", str(ROOT / "constraints.txt"), "--only-binary", ":all:", "atheris", check=False):
        print("install: atheris could not be installed; the parsers' fuzz test will be skipped", flush=True)


def main() -> None:
    """Create or refresh the environment."""
    if sys.version_info < (3, 11):  # noqa: UP036  (this script is what tells the user)
        sys.exit(f"install: pacenote needs Python 3.11 or newer, this is {sys.version.split()[0]}; set PYTHON=...")
    stamp, wanted = VENV / ".pacenote", digest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"install: setting up {VENV.name} (once)", flush=True)
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    install_torch()
    pip("-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]")
    install_megatron()
    install_clients()
    install_gateways()
    install_protocol()
    install_fuzzer()
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
