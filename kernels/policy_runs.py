# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device functions of `policy_triton`: arithmetic that keeps digits and NaN, and the runs that a batch is cut into.

Legend: T tokens, S samples, R runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pacenote.kernels.reference_policy import MAX_LOG_RATIO

BOUND = tl.constexpr(MAX_LOG_RATIO)


# --- arithmetic: comparisons, not minimum and maximum, which lose a NaN ----------------------------------------------


@triton.jit
def bounded(x):
    """x within the bound; NaN stays."""
    return tl.where(x > BOUND, BOUND, tl.where(x < -BOUND, -BOUND, x))


@triton.jit
def exp(x):
    """e^x of |x| <= 100, from n = x / log 2 and a remainder: the compilers' own loses digits as x grows."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    return tl.exp((x - n * 0.693145751953125) - n * 1.428606765330187e-06) * tl.exp2(n)


@triton.jit
def k3(x):
    """e^x - 1 - x, x bounded above; near 0, where that cancels, by its series."""
    x = tl.where(x > BOUND, BOUND, x)
    series = 1.0 + x / 12.0
    for i in tl.static_range(9):
        series = 1.0 + x / (11.0 - i) * series
    return tl.where(tl.abs(x) < 1.0, 0.5 * x * x * series, exp(tl.where(x < -80.0, -80.0, x)) - 1.0 - x)


@triton.jit
def times(factor, value):
    """factor * value, 0 where the factor is."""
    return tl.where(factor == 0.0, 0.0, factor * value)


@triton.jit
def outside(x, low, high):
    """Whether x is outside a band, edges inside."""
    return (x < low) | (x > high)


# --- runs ------------------------------------------------------------------------------------------------------------


@triton.jit
def read(values, t, here):
    """Values at t where `here`, else 0, in float32."""
    return tl.load(values + t, mask=here, other=0.0).to(tl.float32)


@triton.jit
def run(segment_ids, mask, T, samples, steps, BLOCK: tl.constexpr):
    """This program's positions, which of them are its run's, which of those are trained, and their sample."""
    edge = tl.program_id(0) + tl.arange(0, 2)
    low = tl.zeros_like(edge)
    high = low + T
    for _ in range(steps):
        middle = low + (high - low) // 2
        more = low < high
        found = tl.load(segment_ids + middle, mask=more, other=0)
        sample = tl.where((found < 0) | (found > samples), samples, found).to(tl.int32)
        below = sample + middle // BLOCK < edge
        low = tl.where(more & below, middle + 1, low)
        high = tl.where(more & (below == 0), middle, high)
    start, end = tl.min(low, axis=0), tl.max(low, axis=0)
    t = start + tl.arange(0, BLOCK)
    found = tl.load(segment_ids + start, mask=start < T, other=-1)
    sample = tl.where((found < 0) | (found > samples), samples, found).to(tl.int32)
    known = tl.where(sample < samples, end, start)
    return t, t < end, tl.load(mask + t, mask=t < known, other=0) != 0, sample


@triton.jit
def keep(sums, which, value, here):
    """Store the sum of one of a run's terms."""
    at = which * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + at, tl.sum(tl.where(here, value.to(tl.float32), 0.0), axis=0))


@triton.jit
def sample_sum(sums, which, low, high, runs, CHUNK: tl.constexpr):
    """The sum of one of the terms over runs low..high-1."""
    total = tl.zeros([CHUNK], tl.float32)
    for first in range(low, high, CHUNK):
        r = first + tl.arange(0, CHUNK)
        total += tl.load(sums + which * runs + r, mask=r < high, other=0.0)
    return tl.sum(total, axis=0)
