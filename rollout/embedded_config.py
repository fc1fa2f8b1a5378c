"""Options of the embedded engine's process: a dataclass and the command line that makes one. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pacenote.rollout.embedded_pair import MODES, Mode
from pacenote.rollout.toolcalls import REASONING_PARSERS, TOOL_CALL_PARSERS

DTYPES = ("bfloat16", "float16", "float32")
EXPERTS = ("auto", "eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of the engine process, named as SGLang's server arguments.

    Raises:
        ValueError: a number out of range.
    """

    model_path: Path
    host: str = "127.0.0.1"
    port: int = 30000
    dtype: str = "bfloat16"
    device: str = "cpu"
    max_running_requests: int = 64
    context_length: int | None = None
    max_prefill_tokens: int = 4096
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    served_model_name: str | None = None
    random_seed: int = 0
    weight_version: str = "default"
    experts_implementation: str = "auto"
    threads: int = 1
    exact: bool = False
    disaggregation_mode: Mode = "null"
    disaggregation_bootstrap_port: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_running_requests", "max_prefill_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        if self.context_length is not None and self.context_length < 2:
            raise ValueError(f"expected context_length to be at least 2, got {self.context_length}")
        if not 0 <= self.random_seed < 2**63:
            raise ValueError(f"expected random_seed in [0, 2**63), got {self.random_seed}")
        if self.disaggregation_mode not in MODES:
            raise ValueError(f"expected disaggregation_mode of {', '.join(MODES)}, got {self.disaggregation_mode!r}")
        if (self.disaggregation_mode == "prefill") != (self.disaggregation_bootstrap_port is not None):
            raise ValueError(
                "expected disaggregation_bootstrap_port with disaggregation_mode prefill, and only there, got "
                f"{self.disaggregation_bootstrap_port} with {self.disaggregation_mode}"
            )
        if self.exact and (self.device != "cpu" or self.experts_implementation not in ("auto", "eager")):
            raise ValueError(
                "expected device cpu and eager experts for exact logprobs, "
                f"got {self.device} and {self.experts_implementation}"
            )


def parse_arguments(arguments: Sequence[str]) -> EngineConfig:
    """Command line -> config; prints usage and exits with code 2 on bad options."""
    parser = argparse.ArgumentParser(
        prog="python -m pacenote.rollout.embedded",
        description="Serve a small mixture-of-experts model over SGLang's HTTP protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="directory with config.json, weights and tokenizer")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=30000, help="port to listen on")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of weights and activations")
    add("--device", default="cpu", help="torch device")
    add("--max-running-requests", type=int, default=64, help="requests that generate at once")
    add("--context-length", type=int, help="longest request in tokens; the model's own limit if left out")
    add("--max-prefill-tokens", type=int, default=4096, help="prompt tokens in one prefill, padding counted")
    add("--tool-call-parser", choices=TOOL_CALL_PARSERS, help="take tool calls out of the text")
    add("--reasoning-parser", choices=REASONING_PARSERS, help="take reasoning out of the text")
    add("--served-model-name", help="name in answers; the model path if left out")
    add("--random-seed", type=int, default=0, help="seed of requests without one")
    add("--weight-version", default="default", help="version name of the first weights")
    add("--experts-implementation", choices=EXPERTS, default="auto", help="transformers' experts code")
    add("--threads", type=int, default=1, help="CPU threads of torch")
    add("--exact", action="store_true", help="logprobs that do not depend on the batch, bit for bit; slower, CPU only")
    add("--disaggregation-mode", choices=MODES, default="null", help="one side of a prefill/decode pair")
    add("--disaggregation-bootstrap-port", type=int, help="where the prefill side meets its decode sides")
    parsed = parser.parse_args(arguments)
    try:
        return EngineConfig(**vars(parsed))
    except ValueError as error:
        parser.error(str(error))
