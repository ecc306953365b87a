"""The deal of frames and the plan of the all-to-all, as arithmetic: no ranks needed."""

import numpy as np
import pytest

from megamed.parallel.exchange import Shard, deal_frames, plan_exchange

# Frames of each microbatch.
STEPS = [[5, 0, 1, 9], [0], [0, 0], [1], [7], [3, 3, 3], [64, 1]]


@pytest.mark.parametrize("num_frames", STEPS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_deal_is_even_to_within_one_frame(num_frames: list[int], num_ranks: int) -> None:
    owners = deal_frames(num_frames, num_ranks)
    assert [len(o) for o in owners] == num_frames
    for microbatch in [*owners, np.concatenate(owners)]:  # each one, and the step as a whole
        counts = np.bincount(microbatch.astype(int), minlength=num_ranks)
        assert counts.max() - counts.min() <= 1


def layouts() -> list[list[Shard]]:
    whole = Shard(0, 40, True)
    return [
        [whole],
        [whole, Shard(0, 40, False)],  # tensor parallel: both hold all, one returns gradients
        [Shard(0, 20, True), Shard(20, 40, True)],  # with sequence parallelism
        [whole, Shard(0, 0, False)],  # pipeline parallel
        [Shard(0, 20, True), Shard(20, 40, True), Shard(0, 0, False), Shard(0, 0, False)],
        [Shard(0, 20, True), Shard(0, 20, False), Shard(20, 40, True), Shard(20, 40, False)],  # TP x CP
    ]


@pytest.mark.parametrize("shards", layouts(), ids=["one", "TP", "TP + SP", "PP", "TP + SP x PP", "TP x CP"])
@pytest.mark.parametrize("num_frames", [[5, 0, 1, 3], [0, 2], [1]])
def test_rows_arrive_where_they_belong_and_gradients_return(shards: list[Shard], num_frames: list[int]) -> None:
    tokens, ranks = 3, range(len(shards))
    rng = np.random.default_rng(0)
    positions = [np.sort(rng.permutation(40)[: n * tokens]) for n in num_frames]
    owners = deal_frames(num_frames, len(shards))
    row_owner = np.concatenate([np.repeat(o, tokens) for o in owners]).astype(int)
    row_position = np.concatenate(positions)
    row_microbatch = np.repeat(np.arange(len(positions)), [len(p) for p in positions])
    rows = np.arange(len(row_owner))
    plans = [plan_exchange(owners, positions, tokens, [shards] * len(num_frames), me) for me in ranks]

    def all_to_all(buffers: list[np.ndarray], send: list[list[int]], recv: list[list[int]]) -> list[np.ndarray]:
        cut = [np.split(b, np.cumsum(s)[:-1]) for b, s in zip(buffers, send, strict=True)]
        received = [[cut[source][me] for source in ranks] for me in ranks]
        for me in ranks:
            assert [len(part) for part in received[me]] == recv[me]
        return [np.concatenate(parts) for parts in received]

    encoded = [rows[row_owner == me] for me in ranks]  # each rank's rows, in order
    arrived = all_to_all(
        [encoded[me][plans[me].send_index] for me in ranks],
        [p.send_splits for p in plans],
        [p.recv_splits for p in plans],
    )
    for me, shard in enumerate(shards):
        ordered = arrived[me][plans[me].order]
        inside = (row_position >= shard.start) & (row_position < shard.end)
        assert ordered.tolist() == rows[inside].tolist()
        expected = [int((row_microbatch[inside] == m).sum()) for m in range(len(positions))]
        assert plans[me].rows_per_microbatch == expected

    # Send a gradient back that names its row: it has to meet the very row that was encoded.
    by_source = []
    for me in ranks:
        grad = np.empty_like(arrived[me])
        grad[plans[me].order] = arrived[me][plans[me].order]
        by_source.append(grad if shards[me].sends_gradient else grad[:0])
    returned = all_to_all(by_source, [p.grad_send_splits for p in plans], [p.grad_recv_splits for p in plans])
    for me in ranks:
        assert sorted(encoded[me][plans[me].grad_index]) == sorted(returned[me])
        assert encoded[me][plans[me].grad_index].tolist() == returned[me].tolist()
    assert sorted(np.concatenate(returned).tolist()) == rows.tolist(), "each row gets one gradient"
