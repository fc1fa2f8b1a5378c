"""Named checks of logprobs and entropies, each a function of the device; see `mutants_logprob`.

Everything is held against float64 log_softmax of the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacenote.kernels import logprob_ops, reference
from pacenote.kernels.logprob import linear_logprob, logprob_from_logits
from pacenote.kernels.logprob_chunks import LogprobChunks
from pacenote.kernels.logprob_head import Mode
from tests.kernels.route_oracle import no_worse

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}
NAN, INF, IGNORE = float("nan"), float("inf"), -100
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("logprob", "entropy", "dhidden", "dweight", "dbias")


def named(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def close(mine: Tensor, other: Tensor) -> None:
    """Two [...] are equal but for roundings, of products whose sizes or layouts differ."""
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    """Normal numbers [shape], the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ids(tokens: int, vocab: int, device: torch.device, seed: int = 9) -> Tensor:
    """Targets [T]: the first and the last id among them."""
    chosen = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    chosen[:1], chosen[1:2] = vocab - 1, 0
    return chosen.to(device)


def large(device: torch.device) -> int:
    """A vocabulary of several blocks of the row kernels and of several splits of the tiles, with a tail."""
    return 601 if device.type == "cpu" else 9001


def few(device: torch.device) -> int:
    """A vocabulary of two splits of the tiles, the last one not full."""
    return 150 if device.type == "cpu" else 2100


def gold(logits: Tensor, targets: Tensor, heat: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Logprob [T] and entropy [T] of all logits [T, V], in their dtype; -p log p is 0 at p = 0."""
    logp = (logits / (heat[:, None] if isinstance(heat, Tensor) and heat.ndim else heat)).log_softmax(1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(1)
    return logp[torch.arange(len(targets), device=logits.device), targets], entropy


def grads_of(out: tuple[Tensor, Tensor], leaves: list[Tensor], slopes: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Results and gradients, detached."""
    grads = torch.autograd.grad(out, leaves, [s.to(o.dtype) for s, o in zip(slopes, out, strict=True)])
    return [x.detach() for x in (*out, *grads)]


def check_linear(
    device: torch.device,
    *,
    tokens: int = 20,
    dim: int = 24,
    vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
    heat: str = "",
    biased: bool = False,
    chunk: int | None = 7,
    mode: Mode = "chunked",
    size: float = 2.0,
) -> None:
    """Results against those of plain torch in float32, gradients against those at the dtype.

    Raises:
        AssertionError: an error is too large.
    """
    vocab = vocab or large(device)
    targets = ids(tokens, vocab, device)
    given = [
        normal(tokens, dim, dtype=dtype, device=device) * size,
        normal(vocab, dim, seed=1, dtype=dtype, device=device),
    ]
    given += [normal(vocab, seed=2, dtype=dtype, device=device)] if biased else []
    degrees: Any = {"": 1.0, "number": 0.7}.get(heat)
    if degrees is None:
        degrees = normal(tokens, seed=3, device=device).abs() + 0.3
    slopes = normal(tokens, seed=4, device=device), normal(tokens, seed=5, device=device)

    def plain(kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in given]
        own = degrees.to(kind) if isinstance(degrees, Tensor) else degrees
        return grads_of(gold(torch.nn.functional.linear(*leaves), targets, own), leaves, slopes)

    leaves = [x.detach().requires_grad_() for x in given]
    out = linear_logprob(
        leaves[0], leaves[1], targets, temperature=degrees, bias=leaves[2] if biased else None, chunk=chunk, mode=mode
    )
    ours, usual, exact = (
        grads_of(out, leaves, slopes),
        [*plain(torch.float32)[:2], *plain(dtype)[2:]],
        plain(torch.float64),
    )
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * len(given)
    for name, mine, other, exactly in zip(NAMES, ours, usual, exact, strict=False):
        no_worse(f"{name} of {[tokens, dim, vocab]} {dtype} {heat} {mode}", mine, other, exactly, mine.dtype)


def check_logits(logits: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    """Results and the gradient against those of plain torch in float32; gives ours.

    Raises:
        AssertionError: an error is too large.
    """
    slopes = normal(len(targets), seed=4, device=logits.device), normal(len(targets), seed=5, device=logits.device)

    def run(kind: torch.dtype) -> list[Tensor]:
        leaf = logits.detach().to(kind).requires_grad_()
        return grads_of(gold(leaf, targets, options.get("temperature", 1.0)), [leaf], slopes)

    leaf = logits.detach().requires_grad_()
    ours = grads_of(logprob_from_logits(leaf, targets, **options), [leaf], slopes)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, logits.dtype]
    for name, mine, other, exactly in zip(
        ("logprob", "entropy", "dlogits"), ours, run(torch.float32), run(torch.float64), strict=True
    ):
        no_worse(f"{name} of {list(logits.shape)} {logits.dtype}", mine, other, exactly, mine.dtype)
    return ours


# --- values ----------------------------------------------------------------------------------------------------------


@named
def values(device: torch.device) -> None:
    """Every dtype, with and without a bias, several chunks of which the last is not full."""
    for dtype in FLOATS:
        check_linear(device, dtype=dtype)
    check_linear(device, dtype=torch.bfloat16, biased=True)
    check_linear(device, tokens=1, vocab=1)
    check_linear(device, tokens=5, vocab=2, dim=1, chunk=None)


@named
def logits(device: torch.device) -> None:
    """From logits of every dtype, whose gradient has that dtype."""
    vocab = large(device)
    for dtype in FLOATS:
        check_logits(4 * normal(9, vocab, dtype=dtype, device=device), ids(9, vocab, device))


@named
def edges(device: torch.device) -> None:
    """Vocabularies at the edges of a block, and of one."""
    for block in (256, 2048, 4096)[: 1 if device.type == "cpu" else 3]:
        for vocab in (1, 2, block - 1, block, block + 1, 2 * block, 2 * block + 1):
            check_logits(3 * normal(3, vocab, seed=vocab, device=device), ids(3, vocab, device))


@named
def temperatures(device: torch.device) -> None:
    """A number, a tensor of none and of as many as there are tokens; with and without a bias."""
    vocab = large(device)
    for heat in ("number", "tensor"):
        check_linear(device, heat=heat, biased=heat == "tensor")
    own = normal(6, seed=3, device=device).abs() + 0.3
    for temperature in (0.4, own, own[:1].expand(6)):
        check_logits(3 * normal(6, vocab, device=device), ids(6, vocab, device), temperature=temperature)


@named
def order_of_logits(device: torch.device) -> None:
    """The largest logit first, last, in the middle, far above all others, far below zero."""
    vocab = large(device)
    base = 4 * normal(1, vocab, device=device).sort().values
    rows = torch.cat([base, base.flip(1), base.roll(vocab // 2, 1), base - 300, base + 300, base * 0])
    rows = torch.cat([rows, torch.where(torch.arange(vocab, device=device) == vocab // 3, 90.0, base)])
    check_logits(rows, ids(7, vocab, device))


@named
def impossible(device: torch.device) -> None:
    """-inf in a block, in all but one entry, as a target: no probability, no share, no gradient, no other harmed."""
    vocab = large(device)
    rows = 3 * normal(6, vocab, device=device)
    rows[0, :300], rows[1, -300:], rows[2, ::2] = -INF, -INF, -INF
    rows[3, torch.arange(vocab, device=device) != 5] = -INF
    rows[4, 7] = -INF
    targets = torch.tensor([vocab - 1, 0, 1, 5, 7, 3], device=device)
    ours = check_logits(rows, targets)
    assert ours[0][4] == -INF
    assert ours[0][3] == ours[1][3] == 0
    assert not ours[2][rows.isinf() & (torch.arange(6, device=device) != 4)[:, None]].any()


@named
def no_distribution(device: torch.device) -> None:
    """All -inf, +inf or NaN: the row is NaN, forward and backward, and no other."""
    vocab = large(device)
    clean, targets = normal(6, vocab, device=device), ids(6, vocab, device)
    spoilt = clean.clone()
    spoilt[1], spoilt[2, vocab - 2], spoilt[4, 3] = -INF, INF, NAN
    leaf = spoilt.requires_grad_()
    slopes = torch.ones(6, device=device), torch.ones(6, device=device)
    logprob, entropy, grad = grads_of(logprob_from_logits(leaf, targets), [leaf], slopes)
    wrong = [False, True, True, False, True, False]
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == wrong
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == wrong
    assert torch.equal(logprob[[0, 3, 5]], logprob_from_logits(clean, targets)[0][[0, 3, 5]])


# --- what must be exactly zero ---------------------------------------------------------------------------------------


@named
def ignored(device: torch.device) -> None:
    """Ignored tokens, masked tokens and whole chunks of them, holding NaN: exactly 0, and the others as if alone."""
    dead = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 0], dtype=torch.bool, device=device)
    clean, weight = normal(10, 12, device=device), normal(70, 12, seed=1, device=device)
    heat = torch.where(dead, 0.0, 1.5)
    modes: tuple[Mode, ...] = ("chunked", "invariant")
    for mode in modes:
        for masked in (False, True):
            targets = torch.where(dead, 999 if masked else IGNORE, torch.arange(10, device=device))
            leaves = [torch.where(dead[:, None], NAN, clean).requires_grad_(), weight.clone().requires_grad_()]
            mask = ~dead if masked else None
            out = linear_logprob(leaves[0], leaves[1], targets, temperature=heat, mask=mask, chunk=3, mode=mode)
            slopes = torch.where(dead, NAN, 1.0), torch.where(dead, NAN, 0.5)
            ours = grads_of(out, leaves, slopes)
            alone = [clean[~dead].requires_grad_(), weight.clone().requires_grad_()]
            wanted = linear_logprob(alone[0], alone[1], targets[~dead], temperature=1.5, mode=mode)
            theirs = grads_of(wanted, alone, (slopes[0][~dead], slopes[1][~dead]))
            for mine, other in zip(ours[:3], theirs[:3], strict=True):
                close(mine[~dead], other)
                assert torch.equal(mine[dead], torch.zeros_like(mine[dead]))
            close(ours[3], theirs[3])
    leaf = torch.where(dead[:, None], NAN, normal(10, 70, seed=2, device=device)).requires_grad_()
    targets = torch.where(dead, IGNORE, torch.arange(10, device=device))
    ours = grads_of(logprob_from_logits(leaf, targets), [leaf], (heat * NAN, heat * NAN))
    for mine in ours:
        assert torch.equal(mine[dead], torch.zeros_like(mine[dead]))
    assert ours[2][~dead].isnan().all()


@named
def padded_vocabulary(device: torch.device) -> None:
    """Beyond the bound stands anything, NaN included; it has no probability and no gradient, at a block's edge too."""
    for bound in (37, 64, 256, 500):
        padding = torch.full((6, 9), NAN, device=device)
        padding[:, ::2] = 1e4
        rows, targets = 3 * normal(6, bound, device=device), ids(6, bound, device)
        leaf = torch.cat([rows, padding], 1).requires_grad_()
        slopes = normal(6, seed=4, device=device), normal(6, seed=5, device=device)
        ours = grads_of(logprob_from_logits(leaf, targets, vocab_bound=bound), [leaf], slopes)
        same = rows.clone().requires_grad_()
        theirs = grads_of(logprob_from_logits(same, targets), [same], slopes)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2][:, :bound], theirs[2])
        assert not ours[2][:, bound:].any()
    modes: tuple[Mode, ...] = ("chunked", "invariant")
    for mode in modes:
        weight = normal(140, 12, device=device)
        weight[133:] = NAN
        bias = torch.where(torch.arange(140, device=device) < 133, normal(140, seed=6, device=device), NAN)
        leaves = [x.requires_grad_() for x in (normal(6, 12, seed=1, device=device), weight, bias)]
        targets = ids(6, 133, device)
        out = linear_logprob(leaves[0], leaves[1], targets, bias=leaves[2], vocab_bound=133, mode=mode)
        ours = grads_of(out, leaves, slopes)
        cut = [leaves[0].detach().requires_grad_(), *(x[:133].detach().requires_grad_() for x in leaves[1:])]
        theirs = grads_of(linear_logprob(cut[0], cut[1], targets, bias=cut[2], mode=mode), cut, slopes)
        for mine, other in zip(ours, theirs, strict=True):
            close(mine[: len(other)], other)
            assert not mine[len(other) :].any()


@named
def nothing(device: torch.device) -> None:
    """No tokens at all, none whose mask is set, all ignored."""
    weight = normal(70, 12, device=device)
    modes: tuple[Mode, ...] = ("chunked", "invariant")
    for mode in modes:
        for tokens, mask, target in ((0, None, 0), (4, False, 0), (4, None, IGNORE)):
            leaves = [normal(tokens, 12, seed=1, device=device).requires_grad_(), weight.clone().requires_grad_()]
            targets = torch.full((tokens,), target, device=device)
            where = None if mask is None else torch.full((tokens,), mask, device=device)
            out = linear_logprob(leaves[0], leaves[1], targets, mask=where, mode=mode)
            ours = grads_of(out, leaves, (torch.ones(tokens, device=device), torch.ones(tokens, device=device)))
            assert [list(x.shape) for x in ours] == [[tokens], [tokens], [tokens, 12], [70, 12]]
            assert not any(x.any() for x in ours)


# --- layouts and sizes -----------------------------------------------------------------------------------------------


@named
def strides(device: torch.device) -> None:
    """Views of hidden states, logits, weights, targets, temperatures and gradients give what their copies give."""
    vocab = large(device)
    targets, heat = ids(12, vocab, device)[::2], (normal(12, seed=3, device=device).abs() + 0.3)[::2]
    wide = normal(6, 2, vocab + 5, device=device)[:, 1, 2 : vocab + 2]
    turned = normal(vocab, 6, device=device).t()
    slope = normal(1, seed=4, device=device).expand(6), normal(12, seed=5, device=device)[1::2]
    for given in (wide, turned):
        leaf, same = (x.detach().requires_grad_() for x in (given, given.contiguous()))
        ours = grads_of(logprob_from_logits(leaf, targets, temperature=heat), [leaf], slope)
        theirs = grads_of(
            logprob_from_logits(same, targets.clone(), temperature=heat.clone()),
            [same],
            (slope[0].clone(), slope[1].clone()),
        )
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other)
    modes: tuple[Mode, ...] = ("chunked", "invariant")
    for mode in modes:
        pair = normal(6, 2, 12, device=device)[:, 1], normal(12, vocab, seed=1, device=device).t()
        leaves, same_pair = (
            [x.detach().requires_grad_() for x in (p, q)] for p, q in (pair, [x.contiguous() for x in pair])
        )
        ours = grads_of(linear_logprob(leaves[0], leaves[1], targets, chunk=4, mode=mode), leaves, slope)
        theirs = grads_of(linear_logprob(same_pair[0], same_pair[1], targets, chunk=4, mode=mode), same_pair, slope)
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other)


@named
def far_rows(device: torch.device) -> None:
    """Rows of logits, and of their gradient, more than 2^31 entries apart."""
    step = 1_100_000_000
    if device.type == "cpu":
        store = torch.from_numpy(np.zeros(2 * step + 8, np.int16)).view(torch.float16)  # untouched pages take no memory
    else:
        store = torch.zeros(2 * step + 8, dtype=torch.float16, device=device)
    rows = store.as_strided((3, 8), (step, 1))
    near = normal(3, 8, dtype=torch.float16, device=device)
    rows.copy_(near)
    targets, slope = ids(3, 8, device), normal(3, seed=4, device=device)
    far, close = logprob_from_logits(rows, targets), logprob_from_logits(near, targets)
    assert torch.equal(far[0], close[0])
    assert torch.equal(far[1], close[1])
    state, out = torch.ones(3, dtype=torch.uint8, device=device), torch.empty_like(near)
    score = logprob_ops.score(logprob_ops.stats(near, None, None, targets)[None], state)
    logprob_ops.slope(near, None, None, targets, state, score, slope, None, out)
    logprob_ops.slope(near, None, None, targets, state, score, slope, None, rows)
    assert torch.equal(rows, out)


# --- parts and chunks ------------------------------------------------------------------------------------------------


@named
def parts(device: torch.device) -> None:
    """Parts of a vocabulary add up to the whole, whichever holds the target, also where one has no probability."""
    rows = 3 * normal(7, 40, device=device)
    rows[0, :10], rows[1, 10:20], rows[2, 20:], rows[3] = -INF, -INF, -INF, -INF
    targets = torch.tensor([12, 5, 9, 1, 0, 39, 20], device=device)
    state = torch.tensor([1, 1, 1, 1, 1, 0, 2], dtype=torch.uint8, device=device)
    found = []
    for start, end in ((0, 10), (10, 20), (20, 40)):
        here = (targets >= start) & (targets < end)
        found.append(logprob_ops.stats(rows[:, start:end], None, None, torch.where(here, targets - start, -1)))
    whole = reference.logprob_stats(rows.double(), targets)
    torch.testing.assert_close(logprob_ops.fold(torch.stack(found)).double(), whole, rtol=1e-5, atol=1e-5)
    got = logprob_ops.score(torch.stack(found), state)
    wanted = gold(rows.double(), targets)
    for mine, other in zip(got.t(), wanted, strict=False):
        torch.testing.assert_close(mine[[0, 1, 2, 4]].double(), other[[0, 1, 2, 4]], rtol=1e-5, atol=1e-5)
    assert got[3, :2].isnan().all()
    assert not got[5].any()
    assert got[6].isnan().all()
    bias, heat = normal(40, seed=1, device=device), torch.full((), 0.5, device=device)
    with_bias = logprob_ops.stats(rows[:, 10:20], bias[10:20], heat, torch.full((7,), -1, device=device))
    none = logprob_ops.stats(rows[:, :0], bias[:0], heat, torch.full((7,), -1, device=device))
    one_part = reference.logprob_stats(((rows + bias) / heat)[:, 10:20].double(), torch.full((7,), -1, device=device))
    torch.testing.assert_close(with_bias.double(), one_part, rtol=1e-5, atol=1e-5)
    assert none.tolist() == [[-INF, 0.0, 0.0, -INF]] * 7, "a rank that holds padding alone"
    many = torch.stack(found[:2])[:, :1].expand(2, 300, 4)  # more rows than a program takes
    assert torch.equal(logprob_ops.fold(many), logprob_ops.fold(many[:, :1].contiguous()).expand(300, 4))


@named
def wrong_rows(device: torch.device) -> None:
    """State WRONG makes a row's gradient NaN, IGNORED makes it 0; a target elsewhere adds nothing to it."""
    rows, targets = 3 * normal(4, 30, device=device), torch.tensor([3, 3, 3, -1], device=device)
    state = torch.tensor([0, 1, 2, 1], dtype=torch.uint8, device=device)
    score = logprob_ops.score(logprob_ops.stats(rows, None, None, targets)[None], torch.ones_like(state))
    out, slope = torch.empty_like(rows), torch.ones(4, device=device)
    logprob_ops.slope(rows, None, None, targets, state, score, slope, None, out)
    p = rows.softmax(1)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[2].isnan().all()
    close(out[3], -p[3])
    torch.testing.assert_close(out[1], torch.nn.functional.one_hot(targets[1], 30) - p[1])


@named
def chunks(device: torch.device) -> None:
    """Gradients given while a chunk's logits live are those of autograd, without a graph, for picked tokens alone."""
    targets, mask = ids(14, 70, device), torch.arange(14, device=device) % 3 != 0
    targets[4] = IGNORE
    slopes = normal(14, seed=4, device=device), normal(14, seed=5, device=device)
    places = mask.nonzero()[:, 0]
    runs: tuple[tuple[Mode, torch.dtype, dict[str, Any]], ...] = (
        ("chunked", torch.float32, {"mask": mask}),
        ("chunked", torch.bfloat16, {"picked": places}),
        ("chunked", torch.float32, {}),
        ("invariant", torch.bfloat16, {"mask": mask}),
        ("invariant", torch.float32, {"picked": places}),
    )
    for mode, dtype, choice in runs:
        given = normal(14, 12, dtype=dtype, device=device), normal(70, 12, seed=1, dtype=dtype, device=device)
        bias = normal(70, seed=2, dtype=dtype, device=device)
        options: dict[str, Any] = {"temperature": 0.8, "chunk": 5, "mode": mode}
        leaves = [x.clone().requires_grad_() for x in (*given, bias)]
        wanted = linear_logprob(leaves[0], leaves[1], targets, bias=leaves[2], mask=mask if choice else None, **options)
        theirs = grads_of(wanted, leaves, slopes)
        run = LogprobChunks.of(given[0], given[1], targets, bias=bias, **choice, **options)
        results = torch.zeros(2, 14, device=device)
        for chunk in run:
            results[0, chunk.index], results[1, chunk.index] = chunk.logprob, chunk.entropy
            chunk.backward(slopes[0][chunk.index], slopes[1][chunk.index])
        for mine, other in zip((*results, *run.gradients()), theirs, strict=True):
            assert mine is not None
            assert torch.equal(mine, other)


@named
def repeats(device: torch.device) -> None:
    """The same bits twice, and for a row of logits alone as among others."""
    vocab = large(device)
    rows, targets = 3 * normal(9, vocab, device=device), ids(9, vocab, device)
    first, second = (logprob_from_logits(rows, targets) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
    for i in range(9):
        alone = logprob_from_logits(rows[i : i + 1], targets[i : i + 1])
        assert torch.equal(torch.cat(alone), torch.stack([first[0][i], first[1][i]]))


# --- invariant -------------------------------------------------------------------------------------------------------


@named
def tiles(device: torch.device) -> None:
    """Mode invariant: every dtype, temperatures, a bias, vocabularies that end within a tile and within a split."""
    for dtype in FLOATS:
        check_linear(device, tokens=34, dim=40, vocab=few(device), dtype=dtype, mode="invariant", chunk=None)
    check_linear(device, heat="tensor", biased=True, vocab=few(device) - 20, mode="invariant")
    check_linear(device, heat="number", vocab=128, dim=64, mode="invariant", chunk=None)
    check_linear(device, vocab=1, mode="invariant", chunk=None)


@named
def rows_alone(device: torch.device) -> None:
    """Mode invariant: a token's bits alone, in any part, order, padding and chunk; also its hidden state's gradient."""
    vocab, tokens = few(device), 35
    heat = normal(tokens, seed=3, device=device).abs() + 0.3
    slopes = normal(tokens, seed=4, device=device), normal(tokens, seed=5, device=device)
    targets, bias = ids(tokens, vocab, device), normal(vocab, seed=2, device=device)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(4)).to(device)
    parts: list[tuple[Any, int | None]] = [
        *((part, None) for part in (slice(0, 1), slice(34, 35), slice(3, 20), order)),
        *((slice(None), chunk) for chunk in (32, 33)),
        (slice(0, 3), 1),
    ]
    for dtype in FLOATS[:2]:
        hidden = normal(tokens, 40, dtype=dtype, device=device)
        weight = normal(vocab, 40, seed=1, dtype=dtype, device=device)

        def run(part: Any, chunk: int | None, h: Tensor = hidden, w: Tensor = weight) -> list[Tensor]:
            leaves = [h[part].requires_grad_(), w.clone().requires_grad_()]
            out = linear_logprob(
                leaves[0], leaves[1], targets[part], temperature=heat[part], bias=bias, mode="invariant", chunk=chunk
            )
            return grads_of(out, leaves, (slopes[0][part], slopes[1][part]))

        whole = run(slice(None), None)
        for part, chunk in parts:
            ours = run(part, chunk)
            for name, mine, all_rows in zip(NAMES, ours[:3], whole, strict=False):
                assert torch.equal(mine, all_rows[part]), f"{name} of {part} in chunks of {chunk} {dtype}: other bits"
            if chunk == 32:  # a multiple of every tile
                assert torch.equal(ours[3], whole[3]), f"dweight in chunks of whole tiles {dtype}: other bits"


@named
def tiles_impossible(device: torch.device) -> None:
    """Mode invariant: splits without probability, a target without it, and rows of NaN that keep to themselves."""
    vocab = large(device)
    hidden, weight = normal(6, 12, device=device), normal(vocab, 12, seed=1, device=device)
    bias = normal(vocab, seed=2, device=device)
    bias[: vocab // 2], bias[-3:] = -INF, -INF
    targets = torch.tensor([vocab // 2, vocab - 4, 0, vocab // 2 + 1, vocab - 1, vocab - 5], device=device)
    spoilt = hidden.clone()
    spoilt[3] = NAN
    out = linear_logprob(spoilt, weight, targets, bias=bias, mode="invariant")
    wanted = gold(hidden.double() @ weight.double().t() + bias.double(), targets)
    fine = torch.tensor([0, 1, 5], device=device)
    for mine, other in zip(out, wanted, strict=True):
        torch.testing.assert_close(mine[fine].double(), other[fine], rtol=1e-5, atol=1e-5)
    assert out[0][[2, 4]].tolist() == [-INF, -INF]
    assert out[1][[2, 4]].isfinite().all()
    assert out[0][3].isnan()
    assert out[1][3].isnan()
