"""Which samples go into which microbatch of which data-parallel rank: plain numbers, decided once, by the leader.

Ranks that share a collective (sharded weights, experts elsewhere) must pass through the model equally often, so each
has the same number of microbatches, and those that meet are about equally long.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import count


def split_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Fill microbatches of at most `budget` positions, longest first, each into the first that has room.

    A sample longer than the budget gets a microbatch of its own: nothing is dropped here.

    Returns:
        Lists of indices into `lengths`; every index stands in exactly one.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Cut into `parts` of nearly equal sums by the largest differencing method (Karmarkar and Karp, 1982).

    The two partial partitions whose parts differ most are joined, the largest part of one with the smallest of the
    other, until one is left.

    Returns:
        Indices into `lengths`, part by part, the largest sum first; parts may be empty.
    """
    order = count()  # of ties, so that lists are never compared
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for index, length in enumerate(lengths):
        partition = [(length, [index]), *((0, []) for _ in range(parts - 1))]
        heapq.heappush(heap, (-length if parts > 1 else 0, next(order), partition))
    while len(heap) > 1:
        _, _, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        pairs = zip(one, reversed(other), strict=True)
        joined = sorted(((a + b, [*left, *right]) for (a, left), (b, right) in pairs), key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], next(order), joined))
    return [indices for _, indices in heap[0][2]] if heap else [[] for _ in range(parts)]


def deal(lengths: Sequence[int], budget: int, ranks: int = 1, multiple: int = 1) -> list[list[list[int]]]:
    """Microbatches of at most `budget` positions for each of `ranks`.

    Args:
        lengths: positions of each sample.
        budget: of a microbatch; a longer sample stands alone.
        ranks: data-parallel ranks.
        multiple: each rank gets a multiple of so many.

    Returns:
        For each rank equally many lists of indices into `lengths`; every index stands in exactly one, and lists may be
        empty where there are not samples enough.
    """
    fewest = split_tokens(lengths, budget)
    if ranks == multiple == 1 or not fewest:
        return [fewest for _ in range(ranks)]
    alone = [[index] for index, length in enumerate(lengths) if length > budget]
    small = [index for index, length in enumerate(lengths) if length <= budget]
    step = ranks * multiple
    wanted = math.ceil(len(fewest) / step) * step
    while True:
        bins = [
            [small[i] for i in part] for part in balanced([lengths[i] for i in small], max(0, wanted - len(alone)) or 1)
        ]
        if all(sum(lengths[i] for i in part) <= budget for part in bins):
            break
        wanted += step
    filled = [part for part in (*alone, *bins) if part]
    filled.sort(key=lambda part: -sum(lengths[i] for i in part))
    filled += [[] for _ in range(-len(filled) % step)]
    return [filled[rank::ranks] for rank in range(ranks)]
