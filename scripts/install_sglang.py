"""Make `.venv-sglang`: real SGLang that serves tiny models on a CPU. Standard library only.

SGLang pins another transformers than pacenote tests with, so it gets an environment of its own; pacenote talks to it
over HTTP and imports nothing of it. What SGLang declares is mostly CUDA: it is installed without its dependencies,
and then what its serving path imports, in the versions of `constraints-sglang.txt`. `tests/sglang/shim` stands in for
what is left of the GPU. For prefill/decode pairs Mooncake's transfer engine moves keys and values over TCP; it links
libibverbs, whose Debian packages are unpacked into the environment where the system lacks them. Without it everything
but pairs works. A stamp keeps the digest of what was installed, so a second run installs nothing.

    python scripts/install_sglang.py            # into .venv-sglang, about 3.6 GB
    VENV=/elsewhere python scripts/install_sglang.py
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("VENV", ROOT / ".venv-sglang"))
TORCH = os.environ.get("TORCH", "2.13.0")
CONSTRAINTS = ROOT / "constraints-sglang.txt"
SHIM = ROOT / "tests" / "sglang" / "shim"
SGLANG = "sglang==0.5.23"
MOONCAKE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
IMPORTS = (
    "aiohttp", "anthropic", "apache-tvm-ffi", "blobfile", "compressed-tensors", "datasets", "distro", "easydict",
    "einops", "fastapi", "gguf", "grpcio-health-checking", "grpcio-reflection", "interegular", "ipython", "kernels",
    "llguidance", "mistral-common", "modelscope", "msgspec", "ninja", "numba", "openai", "openai-harmony", "orjson",
    "partial-json-parser", "pillow", "prometheus-client", "psutil", "pybase64", "python-multipart", "pyzmq", "requests",
    "scipy", "sentencepiece", "setproctitle", "smg-grpc-servicer", "soundfile", "tiktoken",
    "transformers", "triton", "uvicorn", "uvloop", "watchfiles", "xgrammar", "xxhash", "zstandard",
)  # fmt: skip
"""What SGLang's server imports on its way up, without what those declare themselves."""
LIBRARIES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200", "libnuma1")
"""Debian packages that Mooncake's transfer engine links."""


def pip(*words: str, check: bool = True) -> bool:
    """Run pip of the environment; True if it succeeded."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *words]
    done = subprocess.run([*command, "--quiet"], check=False, stderr=None if check else subprocess.DEVNULL)
    if check and done.returncode:
        sys.exit(f"install_sglang: pip failed on: {' '.join(words)}")
    return done.returncode == 0


def digest() -> str:
    """Digest of everything that decides what gets installed."""
    files = [Path(__file__), CONSTRAINTS, *sorted(path for path in SHIM.rglob("*") if path.suffix in (".py", ".toml"))]
    text = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(text + f"{TORCH} {sys.version} {VENV.resolve()}".encode()).hexdigest()


def install_mooncake() -> None:
    """The transfer engine, with shared libraries that the system lacks laid beside it, where its RPATH looks first."""
    if not pip("--no-deps", MOONCAKE, check=False):
        return report_no_pairs("pip cannot find " + MOONCAKE)
    loads = [str(VENV / "bin" / "python"), "-c", "import mooncake.engine"]
    found = subprocess.run(loads, capture_output=True, text=True, check=False)
    if found.returncode:
        site = next(VENV.glob("lib/python*/site-packages/mooncake"))
        why = fetch_libraries(site)
        found = subprocess.run(loads, capture_output=True, text=True, check=False)
        if found.returncode:
            report_no_pairs(why or found.stderr.strip().splitlines()[-1])


def fetch_libraries(target: Path) -> str | None:
    """Unpack the Debian packages of LIBRARIES and put their shared libraries into `target`; why not, if that failed."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "apt-get and dpkg-deb, with which it would fetch them, are not there"
    with tempfile.TemporaryDirectory() as scratch:
        command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", *LIBRARIES]
        fetched = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if fetched.returncode:
            return fetched.stderr.strip()
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
        for path in Path(scratch).glob("**/*.so.*"):
            shutil.copy(path, target / path.name)  # follows links: the file under each of its names
    return None


def report_no_pairs(why: str) -> None:
    """Say what is missing, and for what."""
    print(
        f"install_sglang: prefill/decode pairs will not start, the rest does. Mooncake's transfer engine cannot be "
        f"loaded: {why}. It needs what these Debian packages hold: {', '.join(LIBRARIES)}, libcurl4",
        flush=True,
    )


def main() -> None:
    """Create or refresh the environment."""
    if sys.version_info < (3, 11):  # noqa: UP036  (this script is what tells the user)
        sys.exit(f"install_sglang: needs Python 3.11 or newer, this is {sys.version.split()[0]}; set PYTHON=...")
    stamp, wanted = VENV / ".pacenote", digest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"install_sglang: setting up {VENV.name} (once, some minutes)", flush=True)
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    if not pip(f"torch=={TORCH}+cpu", check=False):
        print(f"install_sglang: no CPU build of torch {TORCH} at hand (name an index that has one in"
              " PIP_EXTRA_INDEX_URL); taking pip's default build, which is large", flush=True)  # fmt: skip
        pip(f"torch=={TORCH}")
    pip("-c", str(CONSTRAINTS), *IMPORTS)
    pip("--no-deps", SGLANG)
    pip("--no-deps", "--force-reinstall", str(SHIM))
    for built in (SHIM / "build", *SHIM.glob("*.egg-info")):
        shutil.rmtree(built, ignore_errors=True)
    install_mooncake()
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
