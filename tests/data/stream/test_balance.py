"""Shares of equal number and nearly equal cost."""

import itertools

import numpy as np
import pytest

from megamed.data.stream.balance import even_shares
from tests.data.stream.test_mixture import stream


def cost(lengths: list[int], num_frames: int) -> float:
    return sum(n * n / 8192 + n for n in lengths) + 300.0 * num_frames


@pytest.mark.parametrize(("count", "num_shares"), [(8, 1), (8, 2), (16, 4), (64, 8), (64, 64)])
def test_every_item_once_and_as_many_for_each(count, num_shares):
    costs = np.random.default_rng(count).lognormal(0, 1, count).tolist()
    shares = even_shares(costs, num_shares)
    assert sorted(itertools.chain(*shares)) == list(range(count))
    assert {len(share) for share in shares} == {count // num_shares}
    assert all([costs[i] for i in share] == sorted((costs[i] for i in share), reverse=True) for share in shares)
    assert shares == even_shares(costs, num_shares)


def test_equal_costs_are_dealt_in_order():
    assert even_shares([1.0] * 6, 2) == [[0, 2, 4], [1, 3, 5]]


def test_it_is_near_the_best_there_is():
    rng = np.random.default_rng(4)
    ours, best = [], []
    for _ in range(50):
        costs = rng.lognormal(0, 1, 8)
        ours.append(max(costs[share].sum() for share in even_shares(costs.tolist(), 2)))
        best.append(min(max(costs[list(half)].sum(), costs.sum() - costs[list(half)].sum())
                        for half in itertools.combinations(range(8), 4)))
    # Graham's bound without the one on the number is 7/6 for two shares.
    assert np.mean(np.array(ours) / best) < 1.02 and max(np.array(ours) / best) < 7 / 6


@pytest.mark.parametrize(("count", "num_shares", "least_gain"), [(16, 4, 2), (64, 8, 4)])
def test_steps_of_a_realistic_mixture(count, num_shares, least_gain):
    """How far the busiest replica is above the mean: rows by turns against even shares."""
    packed = stream()
    before, after = [], []
    for step in range(20):
        rows = packed.rows(step * count, count)
        costs = np.array([cost([s.num_tokens for s in r.sizes], sum(s.num_frames for s in r.sizes)) for r in rows])
        by_turns = [costs[share::num_shares].sum() for share in range(num_shares)]
        even = [costs[share].sum() for share in even_shares(costs.tolist(), num_shares)]
        assert sum(even) == pytest.approx(costs.sum())
        before.append(max(by_turns) / np.mean(by_turns) - 1)
        after.append(max(even) / np.mean(even) - 1)
    assert np.mean(after) < np.mean(before) / least_gain
    assert np.mean(after) < 0.05
