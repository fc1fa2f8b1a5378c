"""Real SGLang on this machine's CPU: only where PACENOTE_SGLANG names its python, as `make test-sglang` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from pacenote.rollout.launch import Service, free_port
from pacenote.rollout.sglang_cpu import PYTHON_VARIABLE, cpu_command, cpu_environment, find_python

if not os.environ.get(PYTHON_VARIABLE):
    collect_ignore_glob = ["*"]

Start = Callable[..., Service]
START_SECONDS = 240.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--record`: write SGLang's answers to tests/rollout/golden instead of holding them against what stands there."""
    parser.addoption("--record", action="store_true", help="write the golden files of tests/rollout anew")


@pytest.fixture(scope="session")
def glm(tiny_dir: Path) -> Path:
    """The tiny GLM-4.7-Flash (MLA, one dense layer and five sparse ones)."""
    return tiny_dir


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE (grouped-query attention, every layer sparse) with the tiny tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from pacenote.trainer.model import STOP_TOKENS, TOKENIZER, save

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, mlp_only_layers=[], max_position_embeddings=512, initializer_range=0.15,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)), pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("qwen")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save(Qwen3MoeForCausalLM(config), out)
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start SGLang with `cpu_command`'s options; returns before it answers. All of a module's servers stop with it."""
    python, logs = find_python(), tmp_path_factory.mktemp("sglang")
    with ExitStack() as stack:

        def one(model: Path, **options: Any) -> Service:
            port = free_port()
            service = Service(
                f"SGLang on port {port}",
                cpu_command(python, model, port=port, **options),
                url=f"http://127.0.0.1:{port}",
                log=logs / f"{port}.log",
                env=cpu_environment(),
            )
            return stack.enter_context(service)

        yield one


@pytest.fixture
def client() -> Iterator[Callable[[Service], httpx.Client]]:
    """Clients of services, closed with the test."""
    with ExitStack() as stack:
        yield lambda service: stack.enter_context(httpx.Client(base_url=service.url, timeout=60, trust_env=False))
