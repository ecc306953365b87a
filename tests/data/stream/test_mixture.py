"""Shares, passes and the order of samples."""

import json
from collections import Counter

import numpy as np
import pytest

from megamed.data.stream.mixture import Mixture, Pick
from megamed.data.stream.packing import FULL, best_fit, pack_block
from megamed.data.stream.position import Size, Stream
from megamed.utils import UserError

CAPACITY = 8192


def realistic(rng: np.random.Generator, count: int) -> np.ndarray:
    """Tokens of samples: mostly short X-ray questions, some reports, a few CT studies of thousands of tokens."""
    kind = rng.choice(3, count, p=[0.80, 0.15, 0.05])
    xray, ct = rng.integers(280, 420, count), rng.integers(3000, CAPACITY, count)
    report = np.clip(rng.lognormal(6.8, 0.5, count), 200, 4000).astype(int)
    return np.select([kind == 0, kind == 1], [xray, report], ct)


SIZES = {"xray": 800, "reports": 150, "ct": 40}
LENGTHS = {
    "xray": np.random.default_rng(1).integers(280, 420, 800),
    "reports": np.clip(np.random.default_rng(2).lognormal(6.8, 0.5, 150), 200, 4000).astype(int),
    "ct": np.random.default_rng(3).integers(3000, CAPACITY, 40),
}
NAMES = list(SIZES)


def mixture(seed: int = 5, weights: tuple[float, ...] = (16, 3, 1)) -> Mixture:
    return Mixture(NAMES, list(SIZES.values()), weights, seed)


def stream(seed: int = 5, unusable: tuple[Pick, ...] = (), **options) -> Stream:
    def measure(pick: Pick) -> Size | None:
        if pick.dataset == 0 and pick.index in {p.index for p in unusable}:
            return None
        return Size(int(LENGTHS[NAMES[pick.dataset]][pick.index]), pick.index % 7)

    return Stream(mixture(seed), measure, CAPACITY, options.pop("rows_per_block", 16), **options)


def test_shares_at_any_moment():
    mixed, state, counts = mixture(), mixture().start(), [0, 0, 0]
    for number in range(1, 5001):
        dataset, state = mixed.turn(state)
        counts[dataset] += 1
        # As in any fair apportionment of three: nobody is off by two samples.
        assert max(abs(c - number * w / 20) for c, w in zip(counts, (16, 3, 1), strict=True)) < 2
    assert counts == [4000, 750, 250]


def test_each_pass_has_every_sample_once_in_an_order_of_its_own():
    mixed, state = mixture(), mixture().start()
    passes = []
    for epoch in range(3):
        picks = []
        for _ in range(150):
            pick, state = mixed.draw(state, 1)
            picks.append(pick)
        assert {p.epoch for p in picks} == {epoch} and {p.dataset for p in picks} == {1}
        passes.append([p.index for p in picks])
        assert sorted(passes[-1]) == list(range(150))
    assert len({tuple(p) for p in passes}) == 3 and passes[0] != list(range(150))
    # The order within a data set depends on the seed and its own name, not on its neighbours.
    alone = Mixture(["reports"], [150], [1.0], 5)
    assert [alone.draw(s, 0)[0].index for s in [alone.start()]] == passes[0][:1]
    other = Mixture(["reports"], [150], [1.0], 6)
    assert [int(i) for i in other._order(0, 0)] != passes[0] == [int(i) for i in alone._order(0, 0)]


def test_best_fit():
    # The classical case that first-come packing gets wrong: 6 + 4 and 5 + 3 + 2, two full rows.
    assert best_fit([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
    assert best_fit([3, 3, 3], 10, max_documents=2) == [[0, 1], [2]]
    lengths = realistic(np.random.default_rng(0), 400)
    rows = best_fit(lengths.tolist(), CAPACITY)
    assert sorted(i for row in rows for i in row) == list(range(400))
    assert max(lengths[row].sum() for row in rows) <= CAPACITY
    assert len(rows) == -(-lengths.sum() // CAPACITY)  # it cannot be done in fewer


def test_a_block_leaves_what_does_not_fill_a_row_but_once():
    rows, left = pack_block([60, 50, 40, 30], 0, 100)
    assert rows == [[0, 2]] and left == [1, 3]
    rows, left = pack_block([50, 30, 70], 2, 100)
    assert rows == [[1, 2], [0]] and left == []
    assert pack_block([98, 97], 0, 100) == ([[0]], [1]) and FULL == 0.98


@pytest.mark.parametrize("rows_per_block", [16, 32])
def test_rows_of_a_realistic_mixture_are_full(rows_per_block):
    packed = stream(rows_per_block=rows_per_block)
    rows = [packed.row(index) for index in range(400)]
    tokens = [sum(size.num_tokens for size in row.sizes) for row in rows]
    assert np.mean(tokens) / CAPACITY >= 0.97 and max(tokens) <= CAPACITY
    # No more of the long rows at the beginning of blocks than at their end.
    longest = [max(size.num_tokens for size in row.sizes) for row in rows]
    assert abs(np.corrcoef(longest, np.arange(400) % rows_per_block)[0, 1]) < 0.15


def test_every_sample_is_in_one_row():
    """Rows and what waits are what the mixture gave, each sample once a pass, long ones and waiting ones, too."""
    packed = stream()
    picks = [pick for index in range(500) for pick in packed.row(index).picks]
    assert len(set(picks)) == len(picks)
    for dataset, size in enumerate(SIZES.values()):
        own = [p for p in picks if p.dataset == dataset]
        passes = Counter(p.epoch for p in own)
        # The samples in the rows of the last block, and the few that wait, are what a pass may still lack.
        assert all(passes[epoch] == size for epoch in range(max(passes) - 1)), passes
    assert picks[0].epoch == 0 and max(p.epoch for p in picks) > 1
    # Shares of samples are those asked for.
    counts = np.bincount([p.dataset for p in picks])
    assert counts / len(picks) == pytest.approx([0.80, 0.15, 0.05], abs=0.005)


def test_rows_are_a_function_of_seed_and_number():
    first, second = stream(), stream()
    expected = [first.row(index) for index in range(300)]
    assert [second.row(index) for index in (299, 7, 150, 299, 0)] == [expected[i] for i in (299, 7, 150, 299, 0)]
    assert [stream(seed=6).row(index) for index in range(3)] != expected[:3]
    forgetful = stream()
    forgetful._kept_rows = 10
    assert [forgetful.row(index) for index in (299, 7, 298)] == [expected[i] for i in (299, 7, 298)]
    assert len(forgetful._blocks) < 5


@pytest.mark.parametrize("position", [0, 1, 50, 161, 300])
def test_a_state_saves_the_replay(position):
    whole = stream()
    expected = [whole.row(index) for index in range(position, position + 40)]
    state = json.loads(json.dumps(whole.state(position)))
    measured: list[Pick] = []
    resumed = stream()
    measure = resumed.measure
    resumed.measure = lambda pick: measured.append(pick) or measure(pick)
    resumed.restore(state)
    assert [resumed.row(index) for index in range(position, position + 40)] == expected
    assert resumed.state(position) == state
    # What lies before the block was not looked at: the blocks of 40 rows alone.
    assert len(measured) < 5 * 16 * 20
    # Rows before it are still what they were.
    assert resumed.row(0) == whole.row(0)


def test_other_data_go_on_behind_what_was_seen():
    whole = stream()
    seen = {p for index in range(100) for p in whole.row(index).picks}
    state = whole.state(100)
    other = Mixture(["reports", "new"], [150, 30], (1, 1), 5)
    changed = Stream(other, lambda pick: Size(2000, 0), CAPACITY, 16)
    changed.go_on(state, 100)
    picks = [p for index in range(100, 116) for p in changed.row(index).picks]
    reports = [p for p in picks if p.dataset == 0]
    again = {(p.epoch, p.index) for p in reports} & {(p.epoch, p.index) for p in seen if p.dataset == 1}
    assert not again and min(p.epoch for p in reports) > 0
    assert abs(len(reports) - len(picks) / 2) <= 2  # no catching up of what is new


def test_samples_that_are_passed_over():
    unusable = tuple(Pick(0, 0, index) for index in range(0, 800, 2))
    packed = stream(unusable=unusable)
    picks = [pick for index in range(200) for pick in packed.row(index).picks]
    assert not [p for p in picks if p.dataset == 0 and p.index % 2 == 0]
    # The share of the data set stays.
    assert np.mean([p.dataset == 0 for p in picks]) == pytest.approx(0.8, abs=0.01)
    with pytest.raises(UserError, match="data set xray: none of its 800 samples can be used"):
        stream(unusable=tuple(Pick(0, 0, index) for index in range(800))).row(0)


def test_one_document_a_row():
    rows = [stream(max_documents=1).row(index) for index in range(50)]
    assert {len(row.picks) for row in rows} == {1}
