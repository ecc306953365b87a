"""What voxels are stored as, and the percentiles that are measured of them once."""

from __future__ import annotations

import numpy as np

from megamed.data.series import DTYPES, PERCENTILES

# Of float voxels every n-th is looked at, so that at most so many are sorted: then a percentile of what is looked at
# lies within 0.04 % of ranks (three standard deviations of the 50th) of that of all.
_MOST_SORTED = 1 << 24


def smallest_dtype(values: np.ndarray) -> str:
    """The first of `DTYPES` that holds every value exactly, `float32` where none of the whole-number ones does."""
    if values.size == 0:
        return DTYPES[0]
    low, high = values.min(), values.max()
    for name in DTYPES[:-1]:
        bounds = np.iinfo(name)
        if bounds.min <= low and high <= bounds.max:
            return name if values.dtype.kind in "iub" or bool((np.rint(values) == values).all()) else DTYPES[-1]
    return DTYPES[-1]


def to_smallest(values: np.ndarray) -> np.ndarray:
    """The values as `smallest_dtype`, in C order; not copied where they are that already."""
    return np.ascontiguousarray(values, dtype=smallest_dtype(values))


def percentiles(voxels: np.ndarray) -> dict[str, float]:
    """Values at `PERCENTILES`, by their text; each is a value that occurs (the inverse of the distribution).

    Exact for whole numbers, which are counted; of more than 2^24 floats, every n-th is looked at.
    """
    if voxels.size == 0:
        return {}
    if voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2:
        counts = _counts(voxels)
        reached = np.cumsum(counts)
        ranks = np.maximum(np.ceil(np.array(PERCENTILES) / 100 * reached[-1]), 1)
        values = np.searchsorted(reached, ranks) + int(np.iinfo(voxels.dtype).min)
    else:
        looked_at = voxels.reshape(-1)[:: -(-voxels.size // _MOST_SORTED)]
        values = np.percentile(looked_at, PERCENTILES, method="inverted_cdf")
    return {str(p): float(v) for p, v in zip(PERCENTILES, values, strict=True)}


def _counts(voxels: np.ndarray) -> np.ndarray:
    """How often each value of the type occurs, from its smallest; slice by slice, for bincount wants 64 bits each."""
    lowest, size = int(np.iinfo(voxels.dtype).min), 1 << (8 * voxels.dtype.itemsize)
    counts = np.zeros(size, np.int64)
    flat = voxels.reshape(-1)
    for start in range(0, flat.size, 1 << 20):
        counts += np.bincount(flat[start : start + (1 << 20)].astype(np.int64) - lowest, minlength=size)
    return counts
