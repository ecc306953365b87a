"""Values of stored numbers: modality look-up or rescale, inversion, padding; in the smallest array that holds them.

Order: modality LUT or rescale, then inversion. PS3.3, C.11.1 and C.7.6.3.1.2.
"""

from __future__ import annotations

import numpy as np

from megamed.data.orientation import Turn
from megamed.data.readers.base import Refusal
from megamed.data.readers.dicom.codecs import stored_range
from megamed.data.readers.dicom.facts import Facts, Frame
from megamed.data.voxels import to_smallest

# Their numbers are physical quantities whichever way they are shown, so MONOCHROME1 turns nothing round.
_QUANTITIES = ("CT", "PT", "NM")

# Where the scale of CT begins; noise reaches a little below air (-1000), writers cut it off here.
VACUUM_HU = -1024

# Whole numbers are gathered in the first of these that holds them all.
_WHOLE = ("int16", "uint16", "int32")


class Canvas:
    """An array that slices are put into, and that becomes wider when a value does not fit.

    Args:
        shape: T, S, H, W.
        turn: how a slice has to be turned, None for as it is.
    """

    def __init__(self, shape: tuple[int, int, int, int], turn: Turn | None = None):
        self._array_TSHW = np.empty(shape, _WHOLE[0])
        self._turn = turn
        self._low, self._high = 0, 0
        self._empty = True
        self._padded: list[tuple[int, int, float, float]] = []
        self._lowest_real = np.inf

    def put(self, t: int, s: int, values_HW: np.ndarray, padding: tuple[float, float] | None = None) -> None:
        """Put the values of one slice to volume t, slice s of the grid before it is turned.

        Args:
            t, s: where.
            values_HW: whole numbers, or float32.
            padding: lowest and highest value that stands for no measurement.
        """
        self._widen(values_HW)
        if self._turn is None:
            self._array_TSHW[t, s] = values_HW
        else:
            at = self._array_TSHW.shape[1] - 1 - s if self._turn.flipped[2] else s
            picture = values_HW.T if self._turn.axes[0] == 1 else values_HW
            flip_w, flip_h = (slice(None, None, -1 if flip else None) for flip in self._turn.flipped[:2])
            self._array_TSHW[t, at] = picture[flip_h, flip_w]
            s = at
        if padding is not None:
            is_padding = (values_HW >= padding[0]) & (values_HW <= padding[1])
            if is_padding.any():
                self._padded.append((t, s, *padding))
            highest = values_HW.max()
            lowest = np.min(values_HW, where=~is_padding, initial=highest)
            if not padding[0] <= lowest <= padding[1]:
                self._lowest_real = min(self._lowest_real, float(lowest))

    def finish(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The array as the smallest type, and notes about padding."""
        notes: tuple[str, ...] = ()
        if self._padded and np.isfinite(self._lowest_real):
            if max(high for *_, high in self._padded) < self._lowest_real:
                for t, s, low, high in self._padded:
                    slice_HW = self._array_TSHW[t, s]
                    slice_HW[(slice_HW >= low) & (slice_HW <= high)] = self._lowest_real
            else:
                notes = ("the padding value lies among real ones, and was left as it is",)
        return to_smallest(self._array_TSHW), notes

    def _widen(self, values: np.ndarray) -> None:
        if self._array_TSHW.dtype.kind == "f":
            return
        if values.dtype.kind == "f":
            self._array_TSHW = self._array_TSHW.astype(np.float32)
            return
        low, high = int(values.min()), int(values.max())
        self._low = low if self._empty else min(self._low, low)
        self._high = high if self._empty else max(self._high, high)
        self._empty = False
        for name in (self._array_TSHW.dtype.name, *_WHOLE):
            bounds = np.iinfo(name)
            if bounds.min <= self._low and self._high <= bounds.max:
                break
        else:
            name = "float32"
        if name != self._array_TSHW.dtype.name:
            self._array_TSHW = self._array_TSHW.astype(name)


def is_inverted(facts: Facts) -> bool:
    """Whether low values are meant to be shown bright, and are turned round."""
    return facts.photometric == "MONOCHROME1" and facts.modality not in _QUANTITIES


def rescale(stored_HW: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """slope x stored + intercept: whole numbers where all are whole, float32 otherwise (rounded once)."""
    if slope == 1 and intercept == 0:
        return stored_HW
    if slope == int(slope) and intercept == int(intercept) and max(abs(slope), abs(intercept)) < 1 << 30:
        # Numbers of 16 bits times a slope of 14 fit into 32, of 32 bits times one of 30 into 64.
        narrow = stored_HW.dtype.itemsize <= 2 and max(abs(slope), abs(intercept)) < 1 << 14
        return stored_HW.astype(np.int32 if narrow else np.int64) * int(slope) + int(intercept)
    with np.errstate(over="ignore"):
        values_HW = (stored_HW * np.float64(slope) + np.float64(intercept)).astype(np.float32)
    if not np.isfinite(values_HW).all():
        raise Refusal("not-finite", "values beyond any scale", "export the series again")
    return values_HW


def inversion_sum(facts: Facts, frame: Frame, table: np.ndarray | None) -> float:
    """What a value and its inverse add up to: the lowest and highest possible value."""
    if table is not None:
        return float(table.min() + table.max())
    low, high = stored_range(facts)
    return frame.slope * (low + high) + 2 * frame.intercept


def look_up(stored_HW: np.ndarray, first: int, table: np.ndarray) -> np.ndarray:
    """Values by a Modality LUT; numbers beyond its ends take the ends (PS3.3, C.11.1.1.1)."""
    values = table[np.clip(stored_HW.astype(np.int64) - first, 0, len(table) - 1)]
    return values.astype(np.int64)
