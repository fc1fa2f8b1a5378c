"""A tiny GLM-4.7-Flash that acts: it thinks, calls a tool, answers, or drives a terminal, at random.

What a random init writes is noise that no agent can use. Here the output layer is set so that the last token decides
the next: embeddings are large beside what the layers add, and a token's output row is the sum of the embeddings of the
tokens that it may follow. The layers, the router among them, run as in any other model. Whole sentences are tokens.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pacenote.trainer.model import TinyShape, build_tiny, load

THOUGHT = "The die decides."
ANSWER = "It is a six."
TOOL = {
    "type": "function",
    "function": {
        "name": "roll",
        "description": "Roll a die.",
        "parameters": {"type": "object", "properties": {"sides": {"type": "integer"}}, "required": ["sides"]},
    },
}
ARGUMENTS = ("<arg_key>", "sides", "</arg_key>", "<arg_value>", "6", "</arg_value>", "</tool_call>")
CALL = "<tool_call>roll" + "".join(ARGUMENTS)


def keys(command: str | None, *, seconds: float = 0.1, done: bool = False) -> str:
    """An answer of terminus-2: type a command and wait, or do nothing; or say that the task is complete."""
    typed = [] if command is None else [{"keystrokes": f"{command}\n", "duration": seconds}]
    return json.dumps({"analysis": "a", "plan": "p", "commands": typed, "task_complete": done})


LOOK, FLOOD, DONE = keys("ls"), keys("seq 1 1500", seconds=1.0), keys(None, done=True)
SAYS = (ANSWER, LOOK, FLOOD, DONE)
MOVES = (*SAYS, "<tool_call>")
"""Tokens that may follow the thought, all as likely."""
SCALE = 1000.0  # norm of an embedding; the layers add about 10 each
DECIDED = 10.0  # norm of an output row


def build_policy(out: Path) -> Path:
    """Write the model to the directory `out`, which is made; returns `out`."""
    shape = TinyShape(num_hidden_layers=3, max_position_embeddings=8192)  # agents' prompts are long
    source = build_tiny(out.parent / f"{out.name}-init", seed=0, shape=shape)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([THOUGHT, *SAYS, "roll", "sides"])
    model = load(source)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        _chain(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def only(tokenizer: Any, *moves: str) -> dict[str, int]:
    """The `logit_bias` that leaves these of MOVES."""
    return {str(tokenizer.convert_tokens_to_ids(move)): -100 for move in MOVES if move not in moves}


def _chain(model: Any, tokenizer: Any) -> None:
    """Set `model` so that the second token of a pair follows the first; a token's successors are as likely."""
    call = ("<tool_call>", "roll", *ARGUMENTS)
    pairs = [("<think>", THOUGHT), (THOUGHT, "</think>"), *itertools.pairwise(call)]
    pairs += [("</think>", move) for move in MOVES] + [(text, "<|user|>") for text in SAYS]
    pairs += [("</tool_call>", "<|observation|>"), ("</tool_call>", "<tool_call>")]
    places = [tokenizer.convert_tokens_to_ids([*pair]) for pair in pairs]
    firsts = sorted({first for first, _ in places})
    embeddings = model.get_input_embeddings().weight
    apart = torch.nn.init.orthogonal_(torch.empty(embeddings.shape[1], embeddings.shape[1]))
    embeddings[firsts] = apart[: len(firsts)]  # so that one token's successors are no other's
    embeddings *= SCALE / embeddings.norm(dim=-1, keepdim=True)
    head = model.get_output_embeddings().weight.zero_()
    for first, second in places:
        head[second] += embeddings[first] * DECIDED / SCALE
