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

An axis is resized as a product with a band matrix, cut into blocks of `_BLOCK` rows: small dense products, for which
BLAS runs at full speed on one thread, some ten times as fast as a loop over pixels.

Shape suffixes: N frames, P planes (1 or 3), C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megamed.data.frames.augment import Augmentation
from megamed.data.frames.raw import RawFrame
from megamed.data.frames.spec import IMAGENET_MEAN, IMAGENET_STD

Interpolation = Literal["cubic", "linear"]

# Half-width of each kernel, in output pixels.
REACH = {"cubic": 2, "linear": 1}
NORMAL_SCALE = tuple(1 / std for std in IMAGENET_STD)
NORMAL_SHIFT = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))

_BLOCK = 16


def margin(length: float, size: int, interpolation: Interpolation) -> int:
    """Pixels beyond a box of that length that its resizing to `size` takes in."""
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
class _Block:
    """Rows `out` of a resize matrix, of which only the columns `taken` are not 0."""

    out: slice
    taken: slice
    weights: np.ndarray


@lru_cache(maxsize=512)
def _blocks(
    num_in: int, start: float, length: float, num_out: int, interpolation: Interpolation
) -> tuple[_Block, ...]:
    matrix = resize_matrix(num_in, start, length, num_out, interpolation)
    blocks = []
    for first in range(0, num_out, _BLOCK):
        rows = matrix[first : first + _BLOCK]
        used = np.flatnonzero(rows.any(axis=0))
        taken = slice(int(used[0]), int(used[-1]) + 1)
        weights = np.ascontiguousarray(rows[:, taken], dtype=np.float32)
        blocks.append(_Block(slice(first, first + len(rows)), taken, weights))
    return tuple(blocks)


def windowed(raw: RawFrame) -> np.ndarray:
    """Planes with values from 0 to 1, float32 [P, H, W]."""
    values = raw.voxels_CHW.astype(np.float32, copy=False)
    planes = np.empty((len(raw.windows), *values.shape[1:]), np.float32)
    with np.errstate(over="ignore"):  # the smallest float32, which stands beside the picture
        for index, (low, high) in enumerate(raw.windows):
            plane, scale = planes[index], 1 / (high - low)
            np.multiply(values[min(index, len(values) - 1)], np.float32(scale), out=plane)
            plane += np.float32(-low * scale)
            np.clip(plane, 0, 1, out=plane)
    return planes


def resized(planes_PHW: np.ndarray, raw: RawFrame, size: int, interpolation: Interpolation) -> np.ndarray:
    """The box of a frame, float32 [P, size, size]."""
    top, left, height, width = raw.box
    num_planes, rows, columns = planes_PHW.shape
    vertical = _blocks(rows, top, height, size, interpolation)
    horizontal = _blocks(columns, left, width, size, interpolation)
    half = np.empty((size, columns), np.float32)
    whole_PHW = np.empty((num_planes, size, size), np.float32)
    for plane_HW, out_HW in zip(planes_PHW, whole_PHW, strict=True):
        for block in vertical:
            np.matmul(block.weights, plane_HW[block.taken], out=half[block.out])
        for block in horizontal:
            np.matmul(half[:, block.taken], block.weights.T, out=out_HW[:, block.out])
    if interpolation == "cubic":
        np.clip(whole_PHW, 0, 1, out=whole_PHW)
    return whole_PHW


def pixels(
    raw: RawFrame,
    size: int,
    interpolation: Interpolation,
    augmentation: Augmentation | None = None,
    out_CHW: np.ndarray | None = None,
) -> np.ndarray:
    """A frame, normalised, float32 [3, size, size].

    Args:
        raw: what was read of it.
        size: edge in pixels.
        interpolation: the kernel.
        augmentation: how it is changed; None for not at all.
        out_CHW: where to write it; a new array where left out.
    """
    planes_PHW = resized(windowed(raw), raw, size, interpolation)
    if augmentation is not None:
        planes_PHW = augmentation.apply(planes_PHW)
    frame_CHW = np.empty((3, size, size), np.float32) if out_CHW is None else out_CHW
    for channel in range(3):
        np.multiply(planes_PHW[min(channel, len(planes_PHW) - 1)], np.float32(NORMAL_SCALE[channel]),
                    out=frame_CHW[channel])
        frame_CHW[channel] += np.float32(NORMAL_SHIFT[channel])
    return frame_CHW
