"""What names a frame: which voxels, through which windows, in three channels. All is decided when it is planned.

Shape suffixes as in `megamed.data.series`: T volumes, S slices, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

MOSAIC = -1
"""As a slice's number: all slices of the volume, tiled into a square."""

Window = tuple[float, float]
"""Values that become 0 and 1; what is beyond is clipped."""

# ImageNet's, which InternVL's image processor takes.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class StudyFrame:
    """One frame of a stored array, as the encoder will see it but for its size.

    Channel c of a pixel is (v - low) / (high - low) of `windows[c]`, clipped to 0 to 1, of slice `slices[c]`.

    Attributes:
        path: the `.npy` file [T, S, H, W] or, for colour, [T, S, H, W, 3]; or a picture's file.
        volume: T.
        slices: S of each channel; `MOSAIC` in all three for a mosaic. Colour has one slice, three times.
        windows: (low, high) of each channel.
        box: what of the picture is shown: top, left, height, width in pixels, fractions allowed (a tile); None is all.
        fit: `pad` to a square before resizing, or `stretch` (a tile, whose grid was chosen for its shape).
    """

    path: str
    volume: int
    slices: tuple[int, int, int]
    windows: tuple[Window, Window, Window]
    box: tuple[float, float, float, float] | None = None
    fit: Literal["pad", "stretch"] = "pad"


@dataclass(frozen=True)
class PlannedStudy:
    """What a sample shows of one series, film or picture.

    Attributes:
        header: one line that says what is shown; empty where nothing is known but the pixels.
        frames: in the order in which they are shown.
        labels: of each frame, what stands before it ("z=12.5 mm"); empty where there is nothing to say.
    """

    header: str
    frames: list[StudyFrame]
    labels: list[str]


Seeds = Sequence[int | None] | None
"""Of each frame's augmentation, 0 or more; None for none, of a frame or of all."""


class FrameLoader(Protocol):
    """Makes frames. Any thread may call it; calls wait for each other."""

    def load(self, frames: Sequence[StudyFrame], seeds: Seeds = None) -> Tensor:
        """Make some frames.

        A frame's pixels depend on nothing but the frame and its seed: not on which others are made with it, nor on
        what was made before.

        Args:
            frames: any number, of any shapes and types.
            seeds: of their augmentation.

        Returns:
            frames_NCHW, float32 [len(frames), 3, size, size], on the device.

        Raises:
            UserError: a file is missing, damaged, or does not have the frame.
        """
        ...
