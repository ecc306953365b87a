"""Variations of training frames that anatomy and scanners allow. What is drawn is a function of a seed alone.

Everything is drawn here and handed to whichever loader makes the frame, so that loaders agree and a resumed run sees
what it would have seen. Frames of one seed move together, as slices of one patient do; noise is each frame's own.

Shape suffixes: P planes, H and W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megamed.data.frames.config import AugmentConfig
from megamed.data.frames.spec import StudyFrame


@dataclass(frozen=True, eq=False)
class Augmentation:
    """One frame's.

    Attributes:
        matrix: float32 [2, 3]: the place (x, y) in the frame that is shown at a place of the result, both in pixels
            from the top left corner, the first pixel's middle at 0.5. Between pixels values are bilinear, beyond the
            frame 0.
        gamma, contrast, brightness: of values v: (v ** gamma - 0.5) * contrast + 0.5 + brightness.
        noise_HW: added to that, float32, the same in all planes; the sum is clipped to 0 to 1.
    """

    matrix: np.ndarray
    gamma: float
    contrast: float
    brightness: float
    noise_HW: np.ndarray

    def apply(self, planes_PHW: np.ndarray) -> np.ndarray:
        """The changed frame, float32 [P, H, W]."""
        values = _warped(planes_PHW, self.matrix) ** np.float32(self.gamma)
        values = (values - np.float32(0.5)) * np.float32(self.contrast) + np.float32(0.5 + self.brightness)
        return np.clip(values + self.noise_HW, 0, 1)


def draw(config: AugmentConfig, seed: int, frame: StudyFrame, size: int) -> Augmentation:
    """Draw a frame's augmentation.

    Args:
        config: how far it may go.
        seed: 0 or more; the same for frames that are to move together.
        frame: which.
        size: edge of the frame in pixels.
    """
    # All are drawn whatever the config, so that changing one leaves the others as they were.
    turn, grow, right, down, bright, contrast, gamma = np.random.default_rng(seed).uniform(-1, 1, 7)
    mirrored, spread = np.random.default_rng([seed, 1]).uniform(0, 1, 2)
    angle, scale = math.radians(config.rotate_deg * turn), 1 + config.scale * grow
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    linear = np.array([[cosine, sine], [-sine, cosine]])
    if config.flip_lr and mirrored < 0.5:
        linear[0] *= -1
    middle = np.full(2, size / 2)
    shift = middle - linear @ (middle + config.translate * size * np.array([right, down]))
    box = (0, 0) if frame.box is None else (int(frame.box[0]), int(frame.box[1]))
    own = np.random.default_rng([seed, 2, frame.volume, *(index + 1 for index in frame.slices), *box])
    return Augmentation(
        matrix=np.column_stack([linear, shift]).astype(np.float32),
        gamma=math.exp(config.gamma * gamma),
        contrast=1 + config.contrast * contrast,
        brightness=config.brightness * bright,
        noise_HW=own.standard_normal((size, size), np.float32) * np.float32(config.noise * spread),
    )


def _warped(planes_PHW: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    num_planes, height, width = planes_PHW.shape
    # In float32 places of some hundred pixels are off by 1e-5 of one.
    columns, rows = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    (a, b, c), (d, e, f) = matrix.astype(np.float64)
    x = np.clip(a * columns + b * rows + c - 0.5, -1, width)
    y = np.clip(d * columns + e * rows + f - 0.5, -1, height)
    left, top = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    across, along = (x - left).astype(np.float32), (y - top).astype(np.float32)
    # A rim of two: a place on the edge of what is clipped reads one further.
    rimmed = np.pad(planes_PHW, ((0, 0), (1, 2), (1, 2))).reshape(num_planes, -1)
    corner = (top + 1) * (width + 3) + left + 1

    def at(offset: int) -> np.ndarray:
        return rimmed[:, corner + offset]

    upper = at(0) + (at(1) - at(0)) * across
    lower = at(width + 3) + (at(width + 4) - at(width + 3)) * across
    return upper + (lower - upper) * along
