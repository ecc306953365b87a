"""Who encodes which frame, and how visual tokens travel between the ranks of a model replica.

Plain arithmetic on the token layout, which all ranks of a replica share: every rank computes the
same plan by itself and nothing is negotiated.

A "row" is one visual token; rows are numbered over all microbatches of a step, frame by frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def deal_frames(num_frames: Sequence[int], num_ranks: int) -> list[np.ndarray]:
    """Deal every microbatch's frames over the ranks of a replica, round robin.

    The deal goes on where the previous microbatch's stopped, so that both each microbatch and the
    whole step are even to within one frame.

    Args:
        num_frames: frames of each microbatch.
        num_ranks: ranks of the replica.

    Returns:
        For each microbatch, the rank that encodes each frame.
    """
    owners, dealt = [], 0
    for count in num_frames:
        owners.append((dealt + np.arange(count)) % num_ranks)
        dealt += count
    return owners


@dataclass(frozen=True)
class Shard:
    """The part [start, end) of the row as it is dealt out whose embeddings a rank holds; empty off the first stage."""

    start: int
    end: int
    sends_gradient: bool
    """False where another rank holds the same part: without sequence parallelism, tensor-parallel ranks
    all have the whole gradient, and one of them returns it."""


@dataclass(frozen=True)
class Exchange:
    """One rank's side of the all-to-all that takes encoded rows to the ranks that embed them."""

    send_index: np.ndarray
    """Which of this rank's encoded rows to send, grouped by destination."""
    send_splits: list[int]
    recv_splits: list[int]
    order: np.ndarray
    """Puts received rows, which come grouped by source, into row order."""
    rows_per_microbatch: list[int]
    """Received rows of each microbatch."""
    grad_send_splits: list[int]
    grad_recv_splits: list[int]
    grad_index: np.ndarray
    """Which encoded row each returned gradient belongs to."""


def plan_exchange(
    owners: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    tokens_per_frame: int,
    shards: Sequence[Sequence[Shard]],
    me: int,
) -> Exchange:
    """Plan the exchange of one step for rank `me`.

    Args:
        owners: the deal, from `deal_frames`.
        positions: for each microbatch, each row's place in the packed sequence, as that is dealt out.
        tokens_per_frame: rows of one frame.
        shards: for each microbatch, each rank's part of the sequence, by rank in the replica.
        me: this rank in the replica.
    """
    owner = np.concatenate([np.repeat(o, tokens_per_frame) for o in owners]).astype(np.int64)
    position = np.concatenate(positions).astype(np.int64)
    microbatch = np.repeat(np.arange(len(positions)), [len(p) for p in positions])
    bounds = np.array([[(s.start, s.end) for s in of_ranks] for of_ranks in shards]).reshape(len(shards), -1, 2)
    num_ranks, sends_gradient = bounds.shape[1], [s.sends_gradient for s in shards[0]]

    # Rows of a step are millions, and ranks hundreds: all rows are looked at for this rank alone.
    mine = owner == me
    start, end = bounds[microbatch[mine]].transpose(2, 1, 0)
    sent = [np.flatnonzero(wanted) for wanted in (position[mine] >= start) & (position[mine] < end)]
    returned = [rows if sends else rows[:0] for rows, sends in zip(sent, sends_gradient, strict=True)]
    start, end = bounds[microbatch, me].T
    received = np.flatnonzero((position >= start) & (position < end))
    by_source = np.argsort(owner[received], kind="stable")
    recv_splits = np.bincount(owner[received], minlength=num_ranks).tolist()
    return Exchange(
        send_index=np.concatenate(sent),
        send_splits=[len(rows) for rows in sent],
        recv_splits=recv_splits,
        order=np.argsort(by_source, kind="stable"),
        rows_per_microbatch=np.bincount(microbatch[received], minlength=len(positions)).tolist(),
        grad_send_splits=recv_splits if sends_gradient[me] else [0] * num_ranks,
        grad_recv_splits=[len(rows) for rows in returned],
        grad_index=np.concatenate(returned),
    )
