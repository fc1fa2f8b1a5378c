"""Named checks of packing, each a function of the device; see `mutants_pack` for the broken kernels that they catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from pacenote.kernels.pack import Layout, Ragged, pack, pack_ragged
from pacenote.kernels.spec import CACHED, DECODE, MISSING, PREFILL, RECOMPUTED
from tests.kernels.pack_oracle import Case, Sample, check, expert_of, make, naive

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}


def named(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def random(
    lengths: list[int], seed: int = 0, *, experts: int = 64, layers: int = 2, k: int = 4, rows: bool = True
) -> Case:
    """Samples of these lengths with random masks, provenance and versions; at least the last token is trained."""
    rng = np.random.default_rng(seed)
    samples = [
        make(
            number,
            [*rng.integers(0, 2, n - 1), 1] if n > 1 else [0] * n,
            experts=experts if rows else None,
            layers=layers,
            k=k,
            provenance=rng.integers(MISSING, RECOMPUTED + 1, n).tolist(),
            version=(rng.random(n) < 0.2).astype(int).tolist(),
        )
        for number, n in enumerate(lengths)
    ]
    return Case(samples, experts=experts, layers=layers, k=k, given=experts)


@named
def sizes(device: torch.device) -> None:
    """One position, a block of them and one more, many samples, many layers, ids that fill words of every width."""
    check(random([2]), device)
    for total in (127, 128, 129, 256, 257, 600):
        check(random([total // 3 + 1, total // 3 + 1, total - 2 * (total // 3) + 1], experts=16, k=2), device)
    check(random([3, 0, 1, 2] * 40, layers=1), device)
    for experts, k in (
        (64, 1),
        (64, 3),
        (128, 8),
        (256, 8),
        (60, 6),
        (512, 10),
        (384, 8),
        (300, 1),
        (1024, 32),
        (90, 7),
    ):
        check(replace(random([9, 30, 2], experts=experts, k=k, layers=3), multiple=16), device)
    for layers in (47, 64, 65, 130):
        check(replace(random([20, 5], experts=61, layers=layers, k=4), multiple=8), device)


@named
def no_tokens(device: torch.device) -> None:
    """No samples, or none with anything to train on."""
    for samples in ([], [make(0, [0, 0]), make(1, []), make(2, [1])]):
        case = Case(samples, multiple=8)
        batch = check(case, device)
        assert batch.num_tokens == 0


@named
def truncation(device: torch.device) -> None:
    """Tokens, masks and rows are cut together; a sample that is left with nothing to train on goes."""
    for max_len in (2, 3, 7, 20, 100):
        check(replace(random([20, 7, 3, 2, 21, 8], seed=max_len), max_len=max_len), device)
    case = Case([make(0, [0, 0, 0, 1]), make(1, [0, 1, 0, 1])], max_len=3)
    assert check(case, device).kept == (1,)


@named
def zigzag(device: torch.device) -> None:
    """Every context-parallel rank's positions; together they hold every token of every sample once."""
    for cp_size in (2, 3, 4, 8):
        case = random([5, 17, 2, 40, 33], seed=cp_size, layers=1)
        seen: list[int] = []
        for rank in range(cp_size):
            mine = replace(case, layout=Layout(cp_size=cp_size, cp_rank=rank), multiple=4)
            batch = check(mine, device)
            real = torch.tensor([p.token is not None for p in naive(mine)[0]])
            seen += batch.tokens.cpu()[real].tolist()
        assert sorted(seen) == sorted(t for s in case.samples for t in s.tokens[:-1].tolist())


@named
def sequence_parallel(device: torch.device) -> None:
    """Routes are cut into equal runs, tokens are not; also of a context-parallel rank's part."""
    for cp_size, sp_size in ((1, 2), (1, 3), (2, 4), (3, 2)):
        case = random([5, 17, 2, 300, 33], seed=sp_size, layers=3)
        whole = check(replace(case, layout=Layout(cp_size=cp_size), multiple=sp_size), device)
        states = []
        for rank in range(sp_size):
            layout = Layout(cp_size=cp_size, sp_size=sp_size, sp_rank=rank)
            batch = check(replace(case, layout=layout), device)
            assert torch.equal(batch.tokens, whole.tokens)
            assert batch.routes is not None
            states += batch.routes.state.tolist()
        assert whole.routes is not None
        assert states == whole.routes.state.tolist()


@named
def layer_table(device: torch.device) -> None:
    """Some layers, in another order, one of them twice, none; more of them than a program takes."""
    case = random([12, 7], layers=70, k=2)
    for taken in ([69], [3, 1, 2], [5, 5], [], list(range(69, -1, -1)), [1, 0] * 70, list(range(2, 69)), [4, 5, 6]):
        check(replace(case, taken=taken, multiple=4), device)
    wide = random([12, 7], experts=300, layers=9, k=8)
    for some in ([2, 3, 4], [8, 0], None):
        check(replace(wide, taken=some), device)


@named
def provenance(device: torch.device) -> None:
    """Which rows are replayed is told by the codes, and by the weights that wrote them."""
    case = random([64, 32, 7], seed=5)
    for codes in ((), (MISSING,), (PREFILL, DECODE, CACHED), (DECODE, RECOMPUTED), (0, 1, 2, 3, 4)):
        check(replace(case, codes=codes), device)
    steady = [replace(s, version=np.ones_like(s.version)) for s in case.samples]
    check(replace(case, samples=steady), device)


@named
def samples_without_rows(device: torch.device) -> None:
    """They get distinct experts spread over all, and are routed freely, whoever stands before and behind them."""
    with_rows, without = random([9, 12, 30]), random([9, 12, 30], rows=False)
    for pattern in ((1, 0, 1), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        samples = [(with_rows if on else without).samples[i] for i, on in enumerate(pattern)]
        for layout in (Layout(), Layout(cp_size=2, cp_rank=1)):
            check(replace(with_rows, samples=samples, multiple=16, layout=layout), device)


@named
def far_rows(device: torch.device) -> None:
    """Rows more than 2^31 ids apart."""
    rows, layers = 70_000, 31_000
    if device.type == "cpu":  # pages that nobody touches take no memory
        experts = torch.from_numpy(np.zeros((rows, layers, 1), np.uint8))
    else:
        experts = torch.zeros((rows, layers, 1), dtype=torch.uint8, device=device)
    experts[-1, -1] = 7
    n = rows + 1
    ragged = Ragged(
        tokens=torch.arange(n, dtype=torch.int32, device=device),
        loss_mask=torch.ones(n, dtype=torch.bool, device=device),
        logprobs=torch.zeros(n, device=device),
        advantages=torch.zeros(n, device=device),
        experts=experts,
        provenance=torch.full((rows,), DECODE, dtype=torch.uint8, device=device),
        fresh=None,
        lengths=np.array([n]),
        kept=np.array([n]),
        has_rows=np.array([True]),
        num_experts=8,
    )
    batch = pack_ragged(ragged, layers=[layers - 1])
    assert batch.routes is not None
    assert batch.routes.rows.shape == (rows, 1, 1)
    assert batch.routes.rows[-1].item() == 7
    assert int(batch.routes.rows.long().sum()) == 7


@named
def anywhere_in_memory(device: torch.device) -> None:
    """Ids that do not stand at a multiple of their words' width, and sources that are views."""
    case = random([9, 30], experts=256, k=8)
    expected = pack(case.samples, device=device)
    assert expected.routes is not None
    ragged = Ragged.of(case.samples, max_len=None, advantages=None, num_experts=None, device=device)
    assert ragged.experts is not None
    for shift in (1, 2, 4):
        size = ragged.experts.numel()
        store = torch.zeros(size + 8, dtype=torch.uint8, device=device)
        experts = store[shift : shift + size].view(ragged.experts.shape)
        experts.copy_(ragged.experts)
        tokens = ragged.tokens.repeat_interleave(2)[::2]
        batch = pack_ragged(replace(ragged, experts=experts, tokens=tokens))
        assert batch.routes is not None
        assert torch.equal(batch.routes.rows, expected.routes.rows)
        assert torch.equal(batch.tokens, expected.tokens)


@named
def one_source_many_layouts(device: torch.device) -> None:
    """A Ragged serves any layout, any number of times, and stays as it is."""
    case = random([16, 5, 30])
    ragged = Ragged.of(case.samples, max_len=None, advantages=None, num_experts=None, device=device)
    arrays = ("tokens", "loss_mask", "logprobs", "experts", "provenance")
    before = [getattr(ragged, name).clone() for name in arrays]
    for layout in (Layout(), Layout(cp_size=2, cp_rank=1), Layout(sp_size=2), Layout()):
        once, direct = pack_ragged(ragged, layout=layout), pack(case.samples, device=device, layout=layout)
        assert once.routes is not None
        assert direct.routes is not None
        assert torch.equal(once.routes.rows, direct.routes.rows)
        assert torch.equal(once.targets, direct.targets)
    for name, values in zip(arrays, before, strict=True):
        assert torch.equal(torch.nan_to_num(getattr(ragged, name)), torch.nan_to_num(values)), name


@named
def a_long_sample(device: torch.device) -> None:
    """One sample beside many short ones: the bisection finds the borders of each."""
    lengths = [2] * 130 + [400] + [3] * 70
    check(random(lengths, layers=1, k=1), device)
    check(replace(random(lengths, layers=1, k=1), layout=Layout(cp_size=2, cp_rank=1)), device)


def sample_of_rows(experts: np.ndarray) -> Sample:
    """A sample around rows [N-1, L, K]."""
    return replace(make(0, [0] + [1] * len(experts)), experts=experts, num_experts=int(experts.max()) + 1)


@named
def largest_ids(device: torch.device) -> None:
    """Ids that fill their bytes come through whole: 255 of 256 experts, 1023 of 1024."""
    for count, kind in ((256, np.uint8), (1024, np.uint16)):
        for k in (1, 2, 3, 4, 8):
            ids = np.array(
                [[[count - 1 - expert_of(i, la, j, k) for j in range(k)] for la in range(2)] for i in range(9)]
            )
            batch = pack([sample_of_rows(ids.astype(kind))], device=device)
            assert batch.routes is not None
            assert batch.routes.rows.tolist() == ids.tolist()
