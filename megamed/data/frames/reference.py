"""Pixels of a frame in NumPy: what a frame is by definition, and the loader for CPUs.

In this order: each plane through its window to 0 to 1, padded to a square with 0 (or stretched), resized, changed by
the augmentation, normalised with ImageNet's mean and standard deviation. Windows come before resizing, as on a
workstation's screen, so that no bone and no metal bleeds into the tissue beside it.

Resizing, along each axis by itself: pixel i of the output lies at `(i + 0.5) * scale - 0.5` of the input, where scale
is the input's length over the output's, and is the mean of the input's pixels around it, weighted by
`kernel(distance / max(1, scale))`; pixels beyond the edge are the edge's. The kernel is a triangle of half-width 1
(`linear`) or Keys' cubic with a = -1/2 (`cubic`: IEEE Trans. ASSP 29, 1981), whose result is clipped to 0 to 1. These
are DALI's definitions; Pillow and torch (antialias=True) have the same but leave out what is beyond the edge, so they
differ there and only there.

An axis is resized as a product with a band matrix, cut into blocks along its diagonal: small dense products, for which
BLAS runs at full speed on one thread, some ten times as fast as a loop over pixels.

Shape suffixes: N frames, P planes (1 or 3), C channels, H and W pixels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from megamed.data.frames.augment import Augmentation
from megamed.data.frames.raw import RawFrame
from megamed.data.frames.spec import IMAGENET_MEAN, IMAGENET_STD, Window

Interpolation = Literal["cubic", "linear", "pillow"]

# Half-width of each kernel, in output pixels.
REACH = {"cubic": 2, "linear": 1, "pillow": 2}
NORMAL_SCALE = tuple(1 / std for std in IMAGENET_STD)
NORMAL_SHIFT = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
NORMAL_WHITE = tuple(scale + shift for scale, shift in zip(NORMAL_SCALE, NORMAL_SHIFT, strict=True))

# Rows of a block at most, and what a call of BLAS costs in weights: in products along the rows and along the columns.
_MOST_ROWS, _CALL_ROWS, _CALL_COLUMNS = 32, 100, 150
# Each thread's workspace for the last size of picture: memory that is taken anew for every frame costs as much as the
# arithmetic. That of large pictures is let go: a thread would keep a hundred MB for a mammogram.
_own = threading.local()
_KEPT_PIXELS = 1 << 20


def margin(length: float, size: int, interpolation: Interpolation) -> int:
    """Pixels beyond a box of that length that its resizing to `size` takes in; with `pillow` all that there are."""
    if interpolation == "pillow":
        return 1 << 20
    return int(np.ceil(REACH[interpolation] * max(1.0, length / size))) + 1


def kernel(x: np.ndarray, interpolation: Interpolation) -> np.ndarray:
    """The kernel at a distance in output pixels."""
    x = np.abs(x)
    if interpolation == "linear":
        return np.maximum(0, 1 - x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resize_matrix(num_in: int, start: float, length: float, num_out: int, interpolation: Interpolation) -> np.ndarray:
    """The weights of an axis, float64 [num_out, num_in]: each output pixel's, of all input pixels.

    Args:
        num_in: pixels of the input.
        start, length: what of it becomes the output.
        num_out: pixels of the output.
        interpolation: the kernel.
    """
    scale = length / num_out
    spread = max(1.0, scale)
    centres = start + (np.arange(num_out) + 0.5) * scale - 0.5
    reach = int(np.ceil(REACH[interpolation] * spread))
    places = np.floor(centres)[:, None].astype(int) + np.arange(-reach, reach + 2)
    weights = kernel((places - centres[:, None]) / spread, interpolation)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((num_out, num_in))
    np.add.at(matrix, (np.arange(num_out)[:, None], np.clip(places, 0, num_in - 1)), weights)
    return matrix


@dataclass(frozen=True, eq=False)
class _Band:
    """A resize matrix as blocks around its diagonal.

    Attributes:
        weights: float32 [blocks, pixels of the output, pixels of the input].
        transposed: the same [blocks, pixels of the input, pixels of the output]: BLAS multiplies from the right by what
            lies so in half the time.
        start: pixel of the input at which block 0 begins, counted from the rim.
        step: pixels of the input from block to block.
        before, after: pixels of the rim, which the first and the last blocks take in with weight 0.
    """

    weights: np.ndarray
    transposed: np.ndarray
    start: int
    step: int
    before: int
    after: int

    @property
    def num_out(self) -> int:
        """Pixels of the output, those included that fill up the last block."""
        return self.weights.shape[0] * self.weights.shape[1]


@lru_cache(maxsize=512)
def _band(num_in: int, start: float, length: float, num_out: int, interpolation: Interpolation, call: int) -> _Band:
    """The blocks of the size for which the products are cheapest; a call of BLAS costs as much as `call` weights."""
    matrix = resize_matrix(num_in, start, length, num_out, interpolation)
    used = matrix != 0
    firsts, lasts = used.argmax(axis=1), num_in - used[:, ::-1].argmax(axis=1)
    best: tuple[float, int, int, int, int] | None = None
    for rows in range(1, min(_MOST_ROWS, num_out) + 1):
        starts = np.arange(0, num_out, rows)
        low, high = np.minimum.reduceat(firsts, starts), np.maximum.reduceat(lasts, starts)
        for step in {math.floor(rows * length / num_out), math.ceil(rows * length / num_out)}:
            along = step * np.arange(len(starts))
            first, last = int((low - along).min()), int((high - along).max())
            cost = len(starts) * (rows * (last - first) + call)
            if best is None or cost < best[0]:
                best = (cost, rows, step, first, last)
    assert best is not None
    _, rows, step, first, last = best
    num_blocks, width = -(-num_out // rows), last - first
    before, after = max(0, -first), max(0, (num_blocks - 1) * step + last - num_in)
    padded = np.zeros((num_blocks * rows, before + num_in + after), np.float32)
    padded[:num_out, before : before + num_in] = matrix
    weights = np.stack([
        padded[block * rows : (block + 1) * rows, block * step + first + before :][:, :width]
        for block in range(num_blocks)
    ])
    transposed = np.ascontiguousarray(weights.transpose(0, 2, 1))
    return _Band(weights, transposed, first + before, step, before, after)


def pixels(
    raw: RawFrame, interpolation: Interpolation, augmentation: Augmentation | None, out_CHW: np.ndarray
) -> None:
    """Make a frame, normalised.

    Args:
        raw: what was read of it.
        interpolation: the kernel.
        augmentation: how it is changed; None for not at all.
        out_CHW: where it is written, float32 [3, size, size].
    """
    size, windows = out_CHW.shape[1], raw.windows
    rounded_PHW = _by_pillow(raw, size) if interpolation == "pillow" else None
    interpolation = "cubic" if interpolation == "pillow" else interpolation
    normal = [_Target(plane_HW, *ends) for plane_HW, *ends in zip(out_CHW, NORMAL_SHIFT, NORMAL_WHITE, strict=True)]
    if augmentation is None and rounded_PHW is None:
        _draw(raw, size, interpolation, [normal] if len(windows) == 1 else [[target] for target in normal])
        return
    if rounded_PHW is not None:
        planes_PHW = rounded_PHW
    else:
        planes_PHW = np.empty((len(windows), size, size), np.float32)
        _draw(raw, size, interpolation, [[_Target(plane_HW, 0.0, 1.0)] for plane_HW in planes_PHW])
        np.clip(planes_PHW, 0, 1, out=planes_PHW)
    changed_PHW = planes_PHW if augmentation is None else augmentation.apply(planes_PHW)
    for channel, target in enumerate(normal):
        target.write(changed_PHW[min(channel, len(windows) - 1)], (0.0, 1.0), np.empty_like(planes_PHW[0]))


def _by_pillow(raw: RawFrame, size: int) -> np.ndarray | None:
    """Planes of a picture of 8 bits, resized by Pillow and rounded to grey levels as it does, from 0 to 1 [P, H, W].

    As InternVL's processors do it, the whole picture is resized to all of its tiles and then cut: Pillow keeps a box in
    single precision, which moves some pixels by a grey level. None for what cannot be had so: other types, windows that
    change values, a frame that is no tile of its picture.
    """
    top, left, height, width = raw.box
    voxels_CHW = np.asarray(raw.voxels_CHW)
    num_rows, num_columns = voxels_CHW.shape[1:]
    # Tiles in all, and which of them this is.
    grid = (num_rows / height, num_columns / width, top / height, left / width)
    rows, columns, row, column = (round(number) for number in grid)
    is_tile = np.allclose(grid, (rows, columns, row, column), rtol=0, atol=1e-6) and row < rows and column < columns
    if voxels_CHW.dtype != np.uint8 or not is_tile or any(tuple(window) != (0.0, 255.0) for window in raw.windows):
        return None
    key = (voxels_CHW.__array_interface__["data"], voxels_CHW.shape, rows, columns, size)
    kept = getattr(_own, "picture", None)
    if kept is None or kept[0] != key:
        shape = (columns * size, rows * size)
        planes = [Image.fromarray(plane).resize(shape, Image.Resampling.BICUBIC) for plane in voxels_CHW]
        # With the voxels, so that no other picture gets their place in memory.
        kept = _own.picture = (key, voxels_CHW, np.stack([np.asarray(plane) for plane in planes]))
    tile_CHW = kept[2][: len(raw.windows), row * size : (row + 1) * size, column * size : (column + 1) * size]
    return tile_CHW.astype(np.float32) / np.float32(255)


@dataclass(frozen=True, eq=False)
class _Target:
    """Where a plane goes, and what black and white become there."""

    out_HW: np.ndarray
    black: float
    white: float

    def write(self, values_HW: np.ndarray, window: Window, scaled_HW: np.ndarray) -> None:
        """Put values of a window there; `scaled_HW` is memory of their size."""
        low, high = window
        scale = (self.white - self.black) / (high - low)
        np.multiply(values_HW, np.float32(scale), out=scaled_HW)
        np.add(scaled_HW, np.float32(self.black - low * scale), out=self.out_HW)


def _draw(raw: RawFrame, size: int, interpolation: Interpolation, targets: Sequence[Sequence[_Target]]) -> None:
    """Put each plane, windowed and resized, where it is wanted.

    Weights add up to 1, so values may be brought from the window to where black and white lie after they are resized,
    of which there are fewer.
    """
    num_rows, num_columns = raw.voxels_CHW.shape[1:]
    top, left, height, width = raw.box
    vertical = _band(num_rows, top, height, size, interpolation, _CALL_ROWS)
    horizontal = _band(num_columns, left, width, size, interpolation, _CALL_COLUMNS)
    space = getattr(_own, "space", None)
    if space is None or (space.vertical, space.horizontal) != (vertical, horizontal):
        space = _Workspace(num_rows, num_columns, size, vertical, horizontal)
        _own.space = space if num_rows * num_columns <= _KEPT_PIXELS else None
    for index, window in enumerate(raw.windows):
        if index < len(raw.voxels_CHW):
            space.values_HW[...] = raw.voxels_CHW[index]
        plane_HW = space.plane(window, interpolation)
        for target in targets[index]:
            target.write(plane_HW, window, space.scaled_HW)


class _Workspace:
    """Memory for a plane's way from voxels to pixels.

    Few calls on much memory, rather than many on as much as a core's own cache holds: those are a tenth faster on one
    thread, but leave other threads too little time to take Python's lock in between.

    Args:
        num_rows, num_columns: of the voxels.
        size: edge of the frame.
        vertical, horizontal: the resize matrices.
    """

    def __init__(self, num_rows: int, num_columns: int, size: int, vertical: _Band, horizontal: _Band):
        self.vertical, self.horizontal = vertical, horizontal
        self.values_HW = np.empty((num_rows, num_columns), np.float32)
        self.scaled_HW = np.empty((size, size), np.float32)
        clipped = np.zeros((vertical.before + num_rows + vertical.after, num_columns), np.float32)
        half = np.zeros((vertical.num_out, horizontal.before + num_columns + horizontal.after), np.float32)
        plane = np.empty((size, horizontal.num_out), np.float32)
        inner = half[:, horizontal.before : horizontal.before + num_columns]
        self._clipped_HW = clipped[vertical.before : vertical.before + num_rows]
        self._plane_HW = plane[:, :size]
        # What goes into the two products and comes out of them, as views: [blocks, H, W].
        self._clipped_blocks = _taken(clipped, vertical, axis=0)
        self._half_blocks = inner.reshape(*vertical.weights.shape[:2], num_columns)
        self._half_columns = _taken(half[:size], horizontal, axis=1)
        self._plane_columns = plane.reshape(size, *horizontal.weights.shape[:2]).transpose(1, 0, 2)

    def plane(self, window: Window, interpolation: Interpolation) -> np.ndarray:
        """`values_HW` within a window, resized, [size, size]; the next one takes its memory."""
        low, high = np.float32(window[0]), np.float32(window[1])
        np.clip(self.values_HW, low, high, out=self._clipped_HW)
        np.matmul(self.vertical.weights, self._clipped_blocks, out=self._half_blocks)
        np.matmul(self._half_columns, self.horizontal.transposed, out=self._plane_columns)
        if interpolation == "cubic":  # its kernel overshoots
            np.clip(self._plane_HW, low, high, out=self._plane_HW)
        return self._plane_HW


def _taken(values_HW: np.ndarray, band: _Band, axis: int) -> np.ndarray:
    """What each block of a band takes in along an axis, [blocks, H, W], as a view."""
    num_blocks, _, width = band.weights.shape
    shape = [num_blocks, *values_HW.shape]
    shape[1 + axis] = width
    strides = (band.step * values_HW.strides[axis], *values_HW.strides)
    first = values_HW[band.start :] if axis == 0 else values_HW[:, band.start :]
    return np.lib.stride_tricks.as_strided(first, shape, strides)
