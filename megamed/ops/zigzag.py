"""Zigzag sharding: which ring rank holds which tokens of a packed row.

Causal attention costs a token as much as it has tokens before it. So each document is cut into 2R chunks for
R ranks, and rank r holds the r-th chunk and the r-th from the end: an early one that sees little, and a late one
that sees nearly all. Every pair sees the same, within each document.

Documents need not divide by 2R and are not padded. Their surplus tokens are dealt out, one a rank, going on where
the last document's deal stopped: chunks of a document differ by at most one token, and all ranks hold equally
many tokens of the row.

Shapes: S tokens of the row, M documents, R ring ranks.
"""

import numpy as np

from megamed.utils import UserError


def chunk_lengths(cu_seqlens: np.ndarray, num_ranks: int) -> np.ndarray:
    """Tokens of each chunk of each document, [M, 2R].

    Args:
        cu_seqlens: [M + 1], the documents' bounds, from 0 to S.
        num_ranks: R; must divide S.

    Raises:
        UserError: R does not divide S.
    """
    if cu_seqlens[-1] % num_ranks:
        raise UserError(
            f"a packed row of {cu_seqlens[-1]} tokens does not divide over {num_ranks} context-parallel ranks; "
            "choose data.seq_length as a multiple",
            everywhere=True,
        )
    each_M, surplus_M = np.divmod(np.diff(cu_seqlens).astype(np.int64), 2 * num_ranks)
    first_M = np.concatenate([[0], np.cumsum(surplus_M)[:-1]])
    turn_MR = (np.arange(num_ranks) - first_M[:, None]) % num_ranks
    # A document's surplus goes round at most twice: the first time to the early chunks, then to the late ones.
    early_MR = each_M[:, None] + (turn_MR < surplus_M[:, None])
    late_MR = each_M[:, None] + (turn_MR + num_ranks < surplus_M[:, None])
    return np.concatenate([early_MR, late_MR[:, ::-1]], axis=1)


def shard_order(cu_seqlens: np.ndarray, num_ranks: int) -> np.ndarray:
    """The row's tokens rank by rank, [R, S / R]: within a rank, document by document, its early chunk, its late one.

    Arguments and errors as for `chunk_lengths`.
    """
    lengths = chunk_lengths(cu_seqlens, num_ranks)
    starts = cu_seqlens[:-1, None].astype(np.int64) + np.cumsum(lengths, axis=1) - lengths
    ranks = np.arange(num_ranks)
    pairs = np.stack([ranks, 2 * num_ranks - 1 - ranks], axis=1)  # [R, 2]
    # [R, M, 2]: a rank's chunks in the order in which it holds them.
    starts, lengths = (x[:, pairs].transpose(1, 0, 2).ravel() for x in (starts, lengths))
    ends = np.cumsum(lengths)
    return (np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)).reshape(num_ranks, -1)
