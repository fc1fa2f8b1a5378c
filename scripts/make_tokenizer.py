"""Build the committed tiny tokenizer: byte-level BPE, 512 entries, with GLM-4.7's control tokens and chat format.

The corpus is the licence text and the words of the tiny task, so the same versions give the same bytes.

    python scripts/make_tokenizer.py [OUT]      # default: trainer/assets/tiny_tokenizer
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 512
TEMPLATE = ROOT / "trainer/assets/tiny_tokenizer/chat_template.jinja"
# GLM marks these as special (skipped when decoding) ...
SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
           "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]  # fmt: skip
# ... and these as ordinary added tokens, which survive skip_special_tokens so that parsers can see them.
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
         "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"]  # fmt: skip
TASK_WORDS = "Reply with letters. Reply with signs. Please write letters. Please write signs. Now letters. Now signs. "
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build() -> PreTrainedTokenizerFast:
    """Train the merges and dress the tokenizer with control tokens and the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    corpus = [(ROOT / "LICENSE").read_text(encoding="utf-8"), TASK_WORDS * 200]
    core.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB - len(SPECIAL) - len(ADDED),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        ),
    )
    core.add_special_tokens(SPECIAL)
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=SPECIAL[1:],
        model_max_length=131072,
    )
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8").rstrip("\n")
    return tokenizer


def main() -> None:
    """Write the tokenizer files."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "trainer/assets/tiny_tokenizer"
    tokenizer = build()
    tokenizer.save_pretrained(out)
    print(f"{len(tokenizer)} entries in {out}")


if __name__ == "__main__":
    main()
