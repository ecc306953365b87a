"""Which replica takes which rows of a step, so that all have as much to do."""

from __future__ import annotations

from collections.abc import Sequence


def even_shares(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Split items into shares of equal number and nearly equal cost.

    The costliest item first, each to the share that has the least and still has room (Graham, 1969, with a bound on
    the number).

    Args:
        costs: of each item; as many as `num_shares` divides.
        num_shares: how many.

    Returns:
        For each share the numbers of its items by falling cost, so that the k-th items of all shares are alike.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0.0] * num_shares
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        with_room = (s for s in range(num_shares) if len(shares[s]) < len(costs) // num_shares)
        share = min(with_room, key=lambda s: (totals[s], s))
        shares[share].append(item)
        totals[share] += costs[item]
    return shares
