"""fMRI volumes as frames for a vision encoder: one mosaic of slices a volume, in three channels.

Shape suffixes: X, Y, Z voxel axes (RAS), T volumes in time, C channels, H and W pixels of the
mosaic or of the frame.

| channel | what it shows | value |
|---|---|---|
| 0 | signal | 0 to 1 from the 1st to the 99th percentile of the stretch, clipped |
| 1 | change c of each voxel of the head against the stretch's mean volume | (1 + c / 3 %) / 2, clipped |
| 2 | change c of the mean over the head, one value all over it | (1 + tanh(c / 0.2 %)) / 2 |

Outside the head channels 1 and 2 are 0.5: no change. An activation is a few percent of a voxel's
signal, but averaging over the head leaves some tenths of a percent, hence the finer scale of
channel 2, and its soft ends: a brighter volume stays brighter, however far a run drifts. All three
are then normalised with the ImageNet mean and standard deviation, as InternVL's image processor does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamed.data.fmri.facts import head_mask, head_signal
from megamed.data.frames.spec import IMAGENET_MEAN, IMAGENET_STD

# Scales of channels 1 and 2, in percent.
VOXEL_SCALE = 3.0
HEAD_SCALE = 0.2


@dataclass(frozen=True)
class StretchScale:
    """What the frames of a stretch share: measured once, used for each of them.

    Attributes:
        low, high: 1st and 99th percentile of the stretch's signal.
        mean_XYZ: mean volume, float32.
        mask_XYZ: voxels of the head, bool.
        change_T: percent change of the mean over the head against its mean in time.
    """

    low: float
    high: float
    mean_XYZ: np.ndarray
    mask_XYZ: np.ndarray
    change_T: np.ndarray


def measure_scale(signal_XYZT: np.ndarray) -> StretchScale:
    """Measure what scales the frames of a stretch; depends on nothing outside it."""
    low, high = (float(value) for value in np.percentile(signal_XYZT, (1, 99)))
    mean_XYZ = signal_XYZT.mean(axis=3)
    mask_XYZ = head_mask(mean_XYZ)
    global_T = head_signal(signal_XYZT, mask_XYZ)
    mean = float(global_T.mean())
    change_T = 100.0 * (global_T / mean - 1.0) if mean > 0 else np.zeros_like(global_T)
    return StretchScale(low, high, mean_XYZ, mask_XYZ, change_T)


def mosaic_frames(
    signal_XYZT: np.ndarray,
    size: int,
    indices: Sequence[int] | None = None,
    scale: StretchScale | None = None,
) -> Tensor:
    """Frames of a stretch of a run, one a volume.

    Slices lie from the lowest to the highest, row by row from the top left; in each the front of the
    head is up and its left is left. The mosaic is padded to a square, so that nothing is stretched,
    and resized with antialiased bilinear interpolation.

    Args:
        signal_XYZT: the whole stretch.
        size: edge of a frame in pixels.
        indices: which volumes of the stretch to draw; all where left out.
        scale: `measure_scale(signal_XYZT)`, where the caller has it already.

    Returns:
        frames_TCHW, float32 [len(indices), 3, size, size], normalised.
    """
    scale = scale or measure_scale(signal_XYZT)
    wanted = range(signal_XYZT.shape[3]) if indices is None else indices
    if not wanted:
        return torch.zeros(0, 3, size, size)
    frames = [_frame(signal_XYZT[..., t], float(scale.change_T[t]), scale, size) for t in wanted]
    frames_TCHW = torch.stack(frames)
    mean_C11 = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std_C11 = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (frames_TCHW - mean_C11) / std_C11


def _frame(volume_XYZ: np.ndarray, head_change: float, scale: StretchScale, size: int) -> Tensor:
    """One frame with values in 0 to 1, [C, H, W]."""
    span = scale.high - scale.low
    signal_XYZ = (volume_XYZ - scale.low) / span if span > 0 else np.zeros_like(volume_XYZ)
    change_XYZ = np.zeros_like(volume_XYZ)
    np.divide(volume_XYZ - scale.mean_XYZ, scale.mean_XYZ, out=change_XYZ, where=scale.mask_XYZ)
    change_XYZ *= 100.0 / VOXEL_SCALE
    head_XYZ = scale.mask_XYZ * np.float32(np.tanh(head_change / HEAD_SCALE))
    channels_CHW = np.stack(
        [
            _mosaic(np.clip(signal_XYZ, 0, 1), 0.0),
            _mosaic(0.5 + 0.5 * np.clip(change_XYZ, -1, 1), 0.5),
            _mosaic(0.5 + 0.5 * head_XYZ, 0.5),
        ]
    )
    resized_1CHW = torch.nn.functional.interpolate(
        torch.from_numpy(channels_CHW)[None], size=(size, size), mode="bilinear", antialias=True
    )
    return resized_1CHW[0]


def _mosaic(volume_XYZ: np.ndarray, background: float) -> np.ndarray:
    """Tile the slices of a volume into a square, float32 [H, W] with H == W."""
    width, height, num_slices = volume_XYZ.shape
    columns = min(range(1, num_slices + 1), key=lambda n: max(n * width, -(-num_slices // n) * height))
    rows = -(-num_slices // columns)
    edge = max(columns * width, rows * height)
    mosaic_HW = np.full((edge, edge), background, dtype=np.float32)
    top, left = (edge - rows * height) // 2, (edge - columns * width) // 2
    for z in range(num_slices):
        row, column = top + z // columns * height, left + z % columns * width
        mosaic_HW[row : row + height, column : column + width] = volume_XYZ[:, ::-1, z].T
    return mosaic_HW
