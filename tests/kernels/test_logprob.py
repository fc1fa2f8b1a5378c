"""Logprob and entropy against float64 log_softmax: values, gradients, what must be exactly zero, and what may exist."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pacenote.kernels import launch, reference
from pacenote.kernels.logprob import linear_logprob, logprob_from_logits
from pacenote.kernels.logprob_chunks import LogprobChunks, chunk_size
from pacenote.kernels.logprob_head import Mode

NAN, INF, IGNORE = float("nan"), float("inf"), -100
CASES = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
Op = Callable[..., tuple[Tensor, Tensor]]


def gold(logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Logprob [T] and entropy [T] from all logits [T, V] in float64; -p log p is 0 at p = 0."""
    logp = (logits.double() / temperature).log_softmax(1)
    return logp[torch.arange(len(targets), device=logits.device), targets], torch.special.entr(logp.exp()).sum(1)


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def through_weight(logits: Tensor, targets: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`linear_logprob` of hidden states that are the logits."""
    return linear_logprob(
        logits, torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device), targets, **kwargs
    )


BOTH = pytest.mark.parametrize("op", [logprob_from_logits, through_weight])


# --- values and gradients --------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(st.sampled_from([(0,), (1,), (5,), (9,), (2, 3), (2, 0), (3, 1)]))
    vocab = draw(st.integers(1, 12))
    return {
        "shape": shape,
        "extra": draw(st.booleans()),  # hidden states of one batch, [1, T, D], against targets [T]
        "dim": draw(st.integers(1, 5)),
        "vocab": vocab,
        "bound": draw(st.none() | st.integers(1, vocab)),
        "chunk": draw(st.none() | st.integers(1, 11)),
        "heat": draw(st.sampled_from(["one", "number", "tensor"])),
        "bias": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
        "ignored": draw(st.sampled_from([0.0, 0.4, 1.0])),
        "ignore_index": draw(st.sampled_from([IGNORE, -1, 10**6])),
        "int32": draw(st.booleans()),
        "linear": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@CASES
@given(case=cases())
def test_everything_at_once(case: dict[str, Any], device: torch.device) -> None:
    """Both ops, any options: the gold where a token is trained; elsewhere 0, no gradient, and NaN inputs unseen."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape, vocab, dim = case["shape"], case["vocab"], case["dim"]
    bound = case["bound"] or vocab
    targets = torch.randint(bound, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < case["ignored"]
    mask = None if case["mask"] is None else torch.rand(shape, generator=generator) < case["mask"]
    dead = ignored if mask is None else ignored | ~mask
    heat: Any = {"one": 1.0, "number": 0.7}.get(case["heat"])
    if heat is None:
        heat = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.3
    x = torch.randn(*shape, dim if case["linear"] else vocab, generator=generator, dtype=torch.float64)
    inputs = [torch.where(dead[..., None], NAN, x)]
    if case["linear"]:
        inputs.append(torch.randn(vocab, dim, generator=generator, dtype=torch.float64))
        if case["bias"]:
            inputs.append(torch.randn(vocab, generator=generator, dtype=torch.float64))
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]

    mine = [i.to(device).requires_grad_() for i in inputs]
    first = mine[0][None] if case["extra"] and len(shape) == 1 else mine[0]
    given_targets = torch.where(ignored, case["ignore_index"], targets).to(
        torch.int32 if case["int32"] else torch.int64
    )
    options: dict[str, Any] = {
        "temperature": heat.to(device) if isinstance(heat, Tensor) else heat,
        "ignore_index": case["ignore_index"],
        "vocab_bound": case["bound"],
        "mask": None if mask is None else mask.to(device),
        "chunk": case["chunk"],
    }
    if case["linear"]:
        options["bias"] = mine[2] if case["bias"] else None
        got = linear_logprob(first, mine[1], given_targets.to(device), **options)
    else:
        got = logprob_from_logits(first, given_targets.to(device), **options)
    assert all(g.shape == shape and g.dtype == torch.float64 for g in got)
    got_grads = torch.autograd.grad(got, mine, [g.to(device) for g in grads])

    theirs = [i.clone().requires_grad_() for i in inputs]
    logits = theirs[0][~dead]
    if case["linear"]:
        logits = logits @ theirs[1].t() + (theirs[2] if case["bias"] else 0.0)
    wanted = gold(logits[:, :bound], targets[~dead], heat[~dead][:, None] if isinstance(heat, Tensor) else heat)
    wanted_grads = torch.autograd.grad(wanted, theirs, [g[~dead] for g in grads], materialize_grads=True)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.cpu()[~dead], w, rtol=1e-11, atol=1e-12)
        assert not g.cpu()[dead].any()
    for g, w in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=1e-10, atol=1e-11)
    assert not got_grads[0].cpu()[dead].any()
    if case["linear"]:
        assert not got_grads[1][bound:].any()


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk": 2}, {"temperature": 0.6, "vocab_bound": 6}, {"ignore_index": 3}, {"mode": "invariant", "chunk": 2}],
)
def test_gradcheck(options: dict[str, Any], device: torch.device) -> None:
    targets = torch.tensor([1, 5, 3, 0, 3], device=device)
    hidden, weight, bias, logits = (normal(*s, device=device).requires_grad_() for s in ((5, 4), (7, 4), (7,), (5, 7)))

    def linear(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(h, w, targets, bias=b, **options)

    assert torch.autograd.gradcheck(linear, (hidden, weight, bias))
    options = {name: value for name, value in options.items() if name != "mode"}
    assert torch.autograd.gradcheck(lambda z: logprob_from_logits(z, targets, **options), (logits,))


def test_only_the_gradients_that_are_wanted(device: torch.device) -> None:
    hidden, weight, targets = normal(5, 4, device=device), normal(7, 4, device=device), torch.arange(5, device=device)
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = torch.autograd.grad(linear_logprob(both[0], both[1], targets)[0].sum(), both)
    for frozen in (0, 1):
        pair = [hidden.clone(), weight.clone()]
        pair[1 - frozen].requires_grad_()
        (got,) = torch.autograd.grad(linear_logprob(pair[0], pair[1], targets)[0].sum(), pair[1 - frozen])
        assert torch.equal(got, wanted[1 - frozen])
    assert not linear_logprob(hidden, weight, targets)[0].requires_grad


@BOTH
def test_chunks_change_nothing(op: Op, device: torch.device) -> None:
    targets = torch.randint(33, (29,), generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for chunk in (None, 1, 4, 28, 29, 1000):
        logits = normal(29, 33, device=device).requires_grad_()
        logprob, entropy = op(logits, targets, chunk=chunk)
        torch.autograd.backward(logprob.sum() + 2 * entropy.sum())
        results.append((logprob, entropy, logits.grad))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_error_is_at_most_twice_plain_torchs(dtype: torch.dtype, size: float, device: torch.device) -> None:
    """Against float64 from the same rounded inputs, for results and gradients; chunks too small to hide in."""
    targets = torch.randint(500, (64,), generator=torch.Generator().manual_seed(0)).to(device)
    hidden, weight = (size * normal(64, 32, device=device)).to(dtype), normal(500, 32, seed=1, device=device).to(dtype)
    grads = normal(64, seed=2, device=device), 0.1 * normal(64, seed=3, device=device)

    def results(kind: torch.dtype, fn: Op) -> list[Tensor]:
        pair = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        out = fn(*pair)
        slopes = torch.autograd.grad(out, pair, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])
        return [x.detach() for x in (*out, *slopes)]

    def plain(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logp = (h @ w.t()).log_softmax(1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)

    exact = results(torch.float64, lambda h, w: gold(h @ w.t(), targets))
    usual = results(dtype, plain)
    ours = results(dtype, lambda h, w: linear_logprob(h, w, targets, chunk=7))
    assert [o.dtype for o in ours] == [torch.float32, torch.float32, dtype, dtype]
    for name, e, u, o in zip(("logprob", "entropy", "dhidden", "dweight"), exact, usual, ours, strict=True):
        slack = torch.finfo(o.dtype).eps * float(e.abs().max())
        error, allowed = float((o.double() - e).abs().max()), float((u.double() - e).abs().max())
        assert error <= 2 * allowed + slack, f"{name}: {error} against {allowed}"


def test_the_definition_is_the_gold(device: torch.device) -> None:
    logits = normal(6, 9, device=device)
    logits[2, 3], logits[4, :8] = -INF, -INF
    targets, heat = torch.tensor([0, 1, 4, 8, 8, 5], device=device), normal(6, device=device).abs() + 0.2
    for temperature in (1.0, 0.7, heat):
        logits.requires_grad_()
        wanted = gold(logits, targets, temperature[:, None] if isinstance(temperature, Tensor) else temperature)
        for got in (
            reference.logprob(logits, targets, temperature),
            logprob_from_logits(logits, targets, temperature=temperature),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
            (slope,) = torch.autograd.grad(got[0].sum() + got[1].sum(), logits, retain_graph=True)
            assert slope.isfinite().all()


# --- infinities, ignored tokens, sizes -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_impossible_tokens(op: Op, dtype: torch.dtype, device: torch.device) -> None:
    """-inf has no probability: no share of the entropy, no gradient; as a target it is impossible, its row unharmed."""
    logits = normal(3, 6, dtype=dtype, device=device)
    logits[:, 4:] = -INF if op is logprob_from_logits else -1e30  # an identity weight would make 0 * -inf of -inf
    targets = torch.tensor([0, 3, 4], device=device)
    wanted = gold(logits[:2, :4], targets[:2])
    logits.requires_grad_()
    logprob, entropy = op(logits, targets)
    torch.testing.assert_close(logprob[:2].double(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy[:2].double(), wanted[1], rtol=1e-5, atol=1e-6)
    assert logprob[2] < -1e29
    assert entropy[2].isfinite()
    (grad,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
    assert grad.isfinite().all()
    assert not grad[:2, 4:].any()
    assert grad[2, 4] == 1


def test_rows_without_a_distribution_are_nan_and_keep_to_themselves(device: torch.device) -> None:
    clean = normal(5, 6, device=device)
    logits, targets = clean.clone(), torch.tensor([0, 3, 2, 1, 1], device=device)
    logits[1], logits[2, 4], logits[3, 0] = -INF, INF, NAN
    logits.requires_grad_()
    for chunk in (1, 5):
        logprob, entropy = logprob_from_logits(logits, targets, chunk=chunk)
        (grad,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
        for values in (logprob, entropy):
            assert values.isnan().tolist() == [False, True, True, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, True, True, False]
        assert torch.equal(logprob[[0, 4]], logprob_from_logits(clean, targets)[0][[0, 4]])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_untrained_rows_touch_nothing(masked: bool, poison: float, device: torch.device) -> None:
    """Also with NaN gradients, a temperature of 0 and a whole chunk of them; masks may cover targets out of range."""
    clean = normal(8, 4, device=device, dtype=torch.float32)
    dead = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool, device=device)
    hidden = torch.where(dead[:, None], poison, clean).requires_grad_()
    weight = normal(7, 4, seed=1, device=device, dtype=torch.float32).requires_grad_()
    targets = torch.where(dead, 999 if masked else IGNORE, torch.arange(8, device=device) % 7)
    heat = torch.where(dead, 0.0, 1.5)
    out = linear_logprob(hidden, weight, targets, chunk=2, temperature=heat, mask=~dead if masked else None)
    grads = torch.autograd.grad(out, (hidden, weight), [torch.where(dead, NAN, 1.0)] * 2)
    alone = [clean[~dead].requires_grad_(), weight.detach().clone().requires_grad_()]
    wanted = linear_logprob(alone[0], alone[1], targets[~dead], temperature=1.5)
    wanted_grads = torch.autograd.grad(wanted, alone, [torch.ones(2, device=device)] * 2)
    for got, want in zip(out, wanted, strict=True):
        torch.testing.assert_close(got[~dead], want)
        assert torch.equal(got[dead], torch.zeros_like(got[dead]))
    torch.testing.assert_close(grads[0][~dead], wanted_grads[0])
    assert torch.equal(grads[0][dead], torch.zeros_like(grads[0][dead]))
    torch.testing.assert_close(grads[1], wanted_grads[1])


@BOTH
def test_padded_vocabulary_has_no_probability(op: Op, device: torch.device) -> None:
    """Whatever stands there, and no gradient either."""
    clean = normal(4, 5, device=device)
    padded = torch.cat([clean, torch.full((4, 3), 50.0, dtype=torch.float64, device=device)], 1).requires_grad_()
    targets = torch.arange(4, device=device)
    for got, want in zip(op(padded, targets, vocab_bound=5), op(clean, targets), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
        (grad,) = torch.autograd.grad(got.sum(), padded, retain_graph=True)
        assert not grad[:, 5:].any()
        assert grad[:, :5].all()


@BOTH
def test_a_vocabulary_of_one(op: Op, device: torch.device) -> None:
    logits = normal(4, 1, device=device).requires_grad_()
    logprob, entropy = op(logits, torch.zeros(4, dtype=torch.int64, device=device))
    (grad,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
    assert not logprob.any()
    assert not entropy.any()
    assert not grad.any()


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-9e4, -9e4, -9e4]], device=device)
    logprob, entropy = logprob_from_logits(logits, torch.tensor([1, 2], device=device), temperature=0.5)
    torch.testing.assert_close(logprob, torch.tensor([-4e4, -(torch.tensor(3.0).log())], device=device))
    torch.testing.assert_close(entropy, torch.tensor([0.0, torch.tensor(3.0).log()], device=device))


# --- what exists, and in which dtype ---------------------------------------------------------------------------------


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor that any op makes, the rows that are projected, and which big storages outlive their use."""

    def __init__(self, big: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.big, self.largest, self.projected = big, 0, 0
        self.made: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and value.is_floating_point():  # the interpreter moves storages as bytes
                held = min(value.numel(), value.untyped_storage().nbytes() // value.element_size())
                self.largest = max(self.largest, held)
                if held >= self.big:
                    self.made.append(weakref.ref(value))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.out) and len(self.made):
            self.projected += out.shape[0] if out.numel() >= self.big else 0
        return out

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.made)


@pytest.mark.parametrize("mode", ["chunked", "invariant"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_logits_beyond_a_chunk(dtype: torch.dtype, mode: Mode, device: torch.device) -> None:
    tokens, vocab, chunk = 96, 400, 16
    hidden, weight = (normal(*s, device=device, dtype=dtype).requires_grad_() for s in ((tokens, 4), (vocab, 4)))
    mask = torch.zeros(tokens, dtype=torch.bool, device=device)
    mask[::2] = True
    with Watch(chunk * vocab) as watch:
        logprob, entropy = linear_logprob(
            hidden, weight, torch.zeros(tokens, dtype=torch.int64, device=device), chunk=chunk, mask=mask, mode=mode
        )
        fused = mode == "invariant" and launch.takes_triton(hidden)
        assert bool(watch.made) != fused, "logits of invariant tiles stay in the kernel"
        assert watch.alive() == 0, "logits are kept for the backward pass"
        if not (hidden.is_cuda or fused):
            assert watch.projected == tokens // 2, "only rows that are trained need logits"
        torch.autograd.backward(logprob.sum() + entropy.sum())
    assert watch.largest == chunk * vocab
    assert watch.alive() == 0


@pytest.mark.parametrize("mode", ["chunked", "invariant"])
def test_gradients_at_once_keep_no_logits(mode: Mode, device: torch.device) -> None:
    """Neither of an earlier chunk nor of all tokens, in one pass that has the gradients at its end."""
    tokens, vocab, chunk = 64, 400, 16
    hidden, weight = (normal(*s, device=device, dtype=torch.float32) for s in ((tokens, 4), (vocab, 4)))
    ones = torch.ones(chunk, device=device)
    with Watch(chunk * vocab) as watch:
        run = LogprobChunks.of(
            hidden, weight, torch.zeros(tokens, dtype=torch.int64, device=device), chunk=chunk, mode=mode
        )
        for turn, piece in enumerate(run):
            assert watch.alive() <= 1, "logits of the chunk before"
            piece.backward(ones, ones)
            assert watch.alive() == 0
            assert turn < tokens // chunk
        grads = run.gradients()
    assert watch.largest == chunk * vocab
    assert all(g is not None and g.isfinite().all() for g in grads[:2])


def test_a_chunk_gives_gradients_once_and_in_its_turn(device: torch.device) -> None:
    hidden, weight = (normal(*s, device=device, dtype=torch.float32) for s in ((4, 3), (5, 3)))
    earlier = None
    run = LogprobChunks.of(hidden, weight, torch.zeros(4, dtype=torch.int64, device=device), chunk=2)
    for piece in run:
        if earlier is not None:
            with pytest.raises(RuntimeError, match="expected backward once, before the next chunk"):
                earlier.backward(torch.ones(2, device=device))
        piece.backward(torch.ones(2, device=device))
        with pytest.raises(RuntimeError, match="expected backward once"):
            piece.backward(torch.ones(2, device=device))
        earlier = piece
    leaf = weight.clone().requires_grad_()
    logprob, _ = linear_logprob(hidden, leaf, torch.zeros(4, dtype=torch.int64, device=device), chunk=2)
    dweight = run.gradients()[1]
    assert dweight is not None
    assert torch.equal(dweight, torch.autograd.grad(logprob.sum(), leaf)[0])


@pytest.mark.parametrize("mode", ["chunked", "invariant"])
def test_gradients_at_once_of_parameters_and_of_some_chunks(mode: Mode, device: torch.device) -> None:
    """Leaves of a graph are taken as they are; a chunk that is not asked for gradients adds none."""
    hidden, weight = (normal(*s, device=device, dtype=torch.float32).requires_grad_() for s in ((4, 3), (5, 3)))
    targets, heat = torch.zeros(4, dtype=torch.int64, device=device), torch.ones(4, device=device).requires_grad_()
    run = LogprobChunks.of(hidden, weight, targets, temperature=heat, chunk=2, mode=mode)
    for turn, piece in enumerate(run):
        assert not piece.logprob.requires_grad
        if turn:
            piece.backward(torch.ones(2, device=device))
    logprob, _ = linear_logprob(hidden[2:], weight, targets[2:], mode=mode)
    wanted = torch.autograd.grad(logprob.sum(), (hidden, weight))
    for got, want in zip(run.gradients(), wanted, strict=False):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # of products of other sizes
    assert not wanted[0][:2].any()


def test_default_chunks() -> None:
    """As many tokens as their logits' room allows, in whole tiles of 128 if there are so many; at least one."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunk_size(None, 151_936, cpu) == 128
    assert chunk_size(None, 300_000, cpu) == 111
    assert chunk_size(None, 151_936, gpu) == 768
    assert chunk_size(None, 10**9, cpu) == 1
    assert chunk_size(7, 151_936, gpu) == 7


def test_copies_of_given_logits_are_of_one_chunk(device: torch.device) -> None:
    tokens, vocab, chunk = 128, 200, 8
    logits = normal(tokens, vocab, device=device, dtype=torch.bfloat16)
    with Watch(chunk * vocab) as watch:
        logprob_from_logits(logits, torch.zeros(tokens, dtype=torch.int64, device=device), chunk=chunk)
        sizes = {ref() is None or ref().dtype for ref in watch.made}
    assert sizes <= {True, torch.bfloat16}, "nothing but views of the logits outlives its chunk"


@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_temperatures_and_biases_of_other_dtypes(other: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight = normal(5, 4, device=device, dtype=dtype), normal(7, 4, seed=1, device=device, dtype=dtype)
    bias, heat = normal(7, device=device, dtype=other), torch.full((5,), 0.5, dtype=other, device=device)
    targets, kind = torch.arange(5, device=device), torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = linear_logprob(hidden, weight, targets, bias=bias, temperature=heat)
    grads = torch.autograd.grad(out, leaves, [torch.ones(5, dtype=kind, device=device)] * 2)
    assert [x.dtype for x in (*out, *grads)] == [kind, kind, dtype, dtype, other]
    wanted = gold(hidden.double() @ weight.double().t() + bias.double(), targets, 0.5)
    for got, want in zip(out, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_inside(device: torch.device) -> None:
    """Logits in bfloat16 would be off by 0.06 at 20, and the backward pass would recompute other ones."""
    results = []
    for on in (False, True):
        pair = [normal(*s, device=device, dtype=torch.float32).requires_grad_() for s in ((6, 8), (9, 8))]
        with torch.autocast(device.type if isinstance(device, torch.device) else device, torch.bfloat16, enabled=on):
            out = linear_logprob(pair[0], pair[1], torch.arange(6, device=device))
            results.append((*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), pair)))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
