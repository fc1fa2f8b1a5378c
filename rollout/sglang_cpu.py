"""Real SGLang on a machine without a GPU, for small models: where it is installed and how it is started.

It lives in an environment of its own, which `scripts/install_sglang.py` of a checkout makes together with what stands
in there for the GPU's parts; nothing of it is imported here. Options: `sglang.srt.server_args.ServerArgs` of SGLang
0.5.23.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pacenote.rollout.launch import ServiceError

PYTHON_VARIABLE = "PACENOTE_SGLANG"
VENV = ".venv-sglang"
Role = Literal["regular", "prefill", "decode"]


def find_python(environment: Mapping[str, str] | None = None) -> Path:
    """The python that has SGLang for a CPU: PACENOTE_SGLANG's, else that of `.venv-sglang` here or in the checkout.

    Raises:
        ServiceError: there is none; the text says how to make it.
    """
    named = (os.environ if environment is None else environment).get(PYTHON_VARIABLE)
    roots = (Path.cwd(), Path(__file__).resolve().parent.parent)
    places = [Path(named)] if named else [root / VENV / "bin" / "python" for root in roots]
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place.absolute()  # not resolved: the link is what makes it that environment's python
    where = f"{PYTHON_VARIABLE}={named}" if named else " or ".join(str(place) for place in places)
    raise ServiceError(
        f"expected a python with SGLang for a CPU at {where}, found none: run `python scripts/install_sglang.py` in a "
        f"checkout of pacenote, or name that python in {PYTHON_VARIABLE}"
    )


def cpu_environment(threads: int = 1) -> dict[str, str]:
    """Variables that the server's process needs: the CPU engine, and nothing of this process's Python."""
    return {
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONPATH": "",
        "PYTHONHOME": "",
    }


def cpu_command(
    python: Path,
    model: Path,
    *,
    port: int,
    host: str = "127.0.0.1",
    role: Role = "regular",
    bootstrap_port: int | None = None,
    dtype: str = "bfloat16",
    context_length: int | None = None,
    max_running_requests: int = 32,
    max_total_tokens: int = 32768,
    served_model_name: str | None = None,
    random_seed: int = 0,
    weight_version: str = "default",
    tool_call_parser: str | None = "glm47",
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line of a server that returns routed experts.

    Args:
        python: of SGLang's environment, as `find_python` gives it.
        role: regular, or one side of a prefill/decode pair, whose keys and values travel over TCP.
        bootstrap_port: where a prefill server tells a decode server about itself; the pair's decode server has none.
        max_total_tokens: tokens of keys and values in memory; a CPU has no GPU memory to measure it by.
        extra: more words of the command line.

    Raises:
        ValueError: a prefill server without a bootstrap port, or another role with one.
    """
    if (role == "prefill") != (bootstrap_port is not None):
        raise ValueError(f"expected a bootstrap port for a prefill server only, got {bootstrap_port} for {role}")
    options: dict[str, object] = {
        "--model-path": model,
        "--host": host,
        "--port": port,
        "--dtype": dtype,
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--context-length": context_length,
        "--mem-fraction-static": 0.1,
        "--max-total-tokens": max_total_tokens,
        "--max-running-requests": max_running_requests,
        "--served-model-name": served_model_name,
        "--random-seed": random_seed,
        "--weight-version": weight_version,
        "--tool-call-parser": tool_call_parser,
        "--watchdog-timeout": 600,
    }
    if role != "regular":
        options |= {
            "--disaggregation-mode": role,
            "--disaggregation-transfer-backend": "mooncake_tcp",
            "--disaggregation-bootstrap-port": bootstrap_port,
        }
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    # Overlapped scheduling waits on CUDA streams; the warm-up request takes seconds that nobody waits for.
    flags = ["--enable-return-routed-experts", "--disable-overlap-schedule", "--skip-server-warmup"]
    return [str(python), "-m", "sglang.launch_server", *given, *flags, *extra]
