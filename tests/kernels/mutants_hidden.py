"""Broken one-pass losses, each with the check of `hidden_checks` that must catch it: see `mutants`."""

from __future__ import annotations

from pacenote.kernels import policy_hidden
from tests.kernels.hidden_checks import CHECKS
from tests.kernels.mutants import Mutant

__all__ = ["CHECKS", "INTERPRETED", "MODULES", "MUTANTS"]

MODULES = (policy_hidden,)
INTERPRETED = False
"""It has no kernel of its own, and the definitions are quick."""

MUTANTS = (
    Mutant("trained tokens in any order", "stable=True)[", "stable=True).flip(0)[", "like_two_calls"),
    Mutant("the untrained ones first", "argsort(~trained", "argsort(trained", "like_two_calls"),
    Mutant("a token too few", ", bound)]", ", bound - 1)]", "like_two_calls"),
    Mutant("too few in silence", "int(number) <= bound", "True", "too_few"),
    Mutant(
        "spare tokens stand in samples",
        "torch.where(live, batch.segment_ids[index], -1)",
        "batch.segment_ids[index].flip(0)",
        "like_two_calls",
    ),
    Mutant(
        "advantages of other tokens", "batch.advantages[index]", "batch.advantages[index].flip(0)", "like_two_calls"
    ),
    Mutant("rollout of other tokens", "=batch.logprobs[index]", "=batch.logprobs[index].flip(0)", "like_two_calls"),
    Mutant("old is the policy itself", "else batch.old_logprobs[index]", "else None", "like_two_calls"),
    Mutant(
        "a reference of other tokens",
        "else self.reference[index]",
        "else self.reference[index].flip(0)",
        "like_two_calls",
    ),
    Mutant(
        "no entropy bonus in gradients",
        "            entropy=entropy,\n            reference=reference,",
        "            reference=reference,",
        "like_two_calls",
    ),
    Mutant("a chunk's own tokens divide", "units = counts.sum().clamp(min=1)", "units = None", "like_two_calls"),
    Mutant(
        "samples are groups of tokens",
        '"group" if config.normalize in ("sequence", "group") else "constant"',
        '"constant"',
        "like_two_calls",
    ),
    Mutant("samples that are empty count", "(counts > 0).sum()", "(counts >= 0).sum()", "like_two_calls"),
    Mutant("groups divide by samples", "(counts / sizes.clamp(min=1)).sum()", "(counts > 0).sum()", "like_two_calls"),
    Mutant("a denominator is forgotten", "Tensor | None = self.denominator", "Tensor | None = None", "denominators"),
    Mutant("an incoming gradient is forgotten", "g.mul_(grad.to(g.dtype))", "g", "denominators"),
    Mutant("given twice", "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", "given_once"),
    Mutant(
        "the padded vocabulary counts", "Head.of(weight, bias, vocab_bound,", "Head.of(weight, bias, None,", "heads"
    ),
    Mutant("the mode is forgotten", "vocab_bound, mode, group", 'vocab_bound, "chunked", group', "heads"),
    Mutant("the chunk is forgotten", "chunk_size(chunk, len", "chunk_size(2, len", "heads"),
    Mutant("sequences in one pass", "if config.by_sample or not wants", "if not wants", "sequences"),
)
