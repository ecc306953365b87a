"""Which samples share a packed row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

# A row that is filled to this share is closed; one that is not waits for the samples of the next block.
FULL = 0.98


def best_fit(lengths: Sequence[int], capacity: int, max_documents: int | None = None) -> list[list[int]]:
    """Pack by best-fit decreasing: the longest first, each into the fullest row that still has room.

    It needs at most 11/9 of the fewest possible rows (Johnson et al., 1974), and hardly more than the fewest where
    most samples are short.

    Args:
        lengths: of the samples, none above `capacity`.
        capacity: of a row.
        max_documents: most samples of a row; None for no bound.

    Returns:
        For each row, the numbers of its samples.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(open_rows, (lengths[item], -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if max_documents is None or len(rows[row]) < max_documents:
            bisect.insort(open_rows, (room - lengths[item], row))
    return rows


def pack_block(
    lengths: Sequence[int], num_waited: int, capacity: int, max_documents: int | None = None
) -> tuple[list[list[int]], list[int]]:
    """Pack a block of samples into rows that are full, and leave what does not fill one to the next block.

    Args:
        lengths: of the samples, none above `capacity`.
        num_waited: so many, the first ones, were left by the block before; they are in a row now, full or not, so that
            none waits for ever.
        capacity: of a row.
        max_documents: most samples of a row; None for no bound.

    Returns:
        For each row, the numbers of its samples in their order; and the numbers of those that are left.
    """
    rows, left = [], []
    for row in best_fit(lengths, capacity, max_documents):
        row.sort()
        is_full = sum(lengths[item] for item in row) >= FULL * capacity or len(row) == max_documents
        if is_full or row[0] < num_waited:
            rows.append(row)
        else:
            left.extend(row)
    return rows, sorted(left)
