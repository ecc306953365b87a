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

from collections.abc import Iterator
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
    planes = _planes(raw, out_CHW.shape[1], interpolation)
    if augmentation is not None:
        planes = iter(augmentation.apply(np.stack([plane_HW.copy() for plane_HW in planes])))
    scaled_HW = np.empty(out_CHW.shape[1:], np.float32)
    plane_HW = next(planes)
    for channel_HW, scale, shift in zip(out_CHW, NORMAL_SCALE, NORMAL_SHIFT, strict=True):
        np.multiply(plane_HW, np.float32(scale), out=scaled_HW)
        np.add(scaled_HW, np.float32(shift), out=channel_HW)
        plane_HW = next(planes, plane_HW)  # of one plane, all channels are made


def _planes(raw: RawFrame, size: int, interpolation: Interpolation) -> Iterator[np.ndarray]:
    """Each plane from 0 to 1, [size, size]; the next one takes its memory, so that a processor's cache holds all."""
    values_CHW = raw.voxels_CHW.astype(np.float32, copy=False)
    num_rows, num_columns = values_CHW.shape[1:]
    top, left, height, width = raw.box
    vertical = _blocks(num_rows, top, height, size, interpolation)
    horizontal = _blocks(num_columns, left, width, size, interpolation)
    whole_HW = np.empty((num_rows, num_columns), np.float32)
    half_HW = np.empty((size, num_columns), np.float32)
    plane_HW = np.empty((size, size), np.float32)
    for index, (low, high) in enumerate(raw.windows):
        scale = 1 / (high - low)
        with np.errstate(over="ignore"):  # the smallest float32, which stands beside the picture
            np.multiply(values_CHW[min(index, len(values_CHW) - 1)], np.float32(scale), out=whole_HW)
        np.add(whole_HW, np.float32(-low * scale), out=whole_HW)
        np.clip(whole_HW, 0, 1, out=whole_HW)
        for block in vertical:
            np.matmul(block.weights, whole_HW[block.taken], out=half_HW[block.out])
        for block in horizontal:
            np.matmul(half_HW[:, block.taken], block.weights.T, out=plane_HW[:, block.out])
        if interpolation == "cubic":  # its kernel overshoots
            np.clip(plane_HW, 0, 1, out=plane_HW)
        yield plane_HW
