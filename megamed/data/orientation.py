"""Canonical orientation: how the axes of a stack are flipped and swapped, never resampled, to the table of `series`.

Shape suffixes: W, H, S along the columns, the rows and the stack of slices, T volumes in time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamed.data.series import Plane

# Directions in RAS in which W, H and S run.
_DIRECTIONS: dict[Plane, np.ndarray] = {
    "axial": np.array([[-1.0, 0, 0], [0, -1.0, 0], [0, 0, 1.0]]),
    "coronal": np.array([[-1.0, 0, 0], [0, 0, -1.0], [0, -1.0, 0]]),
    "sagittal": np.array([[0, -1.0, 0], [0, 0, -1.0], [-1.0, 0, 0]]),
}
_PLANES: tuple[Plane, Plane, Plane] = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class Turn:
    """How a grid is turned.

    Attributes:
        axes: which axis of the grid becomes W, H and S.
        flipped: whether W, H and S run against that axis.
        plane: which way the slices lie.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    plane: Plane

    def affine(self, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The affine of the turned grid.

        Args:
            affine: 4 x 4, of the grid as it is.
            shape: of the grid as it is, three numbers at least.
        """
        turned = np.eye(4)
        turned[:3, 3] = affine[:3, 3]
        for new, (old, flip) in enumerate(zip(self.axes, self.flipped, strict=True)):
            turned[:3, new] = -affine[:3, old] if flip else affine[:3, old]
            if flip:
                turned[:3, 3] += affine[:3, old] * (shape[old] - 1)
        return turned


def find_turn(affine: np.ndarray, slice_axis: int) -> Turn:
    """How a grid has to be turned to lie canonically.

    The plane is that of the patient's axis which the normal of the slices is nearest to; in it, rows and columns
    take the direction that they are nearest to.

    Args:
        affine: 4 x 4, voxel index to mm in RAS.
        slice_axis: which of the three axes runs from slice to slice.

    Raises:
        ValueError: the affine does not span space.
    """
    steps = np.asarray(affine, dtype=np.float64)[:3, :3]
    lengths = np.linalg.norm(steps, axis=0)
    if not np.isfinite(affine).all() or not lengths.all():
        raise ValueError("the affine does not span space")
    steps = steps / lengths
    # A millionth of a unit cube: no tilt or shear of a scanner comes near it.
    if abs(np.linalg.det(steps)) < 1e-6:
        raise ValueError("the affine does not span space")
    first, second = (axis for axis in range(3) if axis != slice_axis)
    normal = np.cross(steps[:, first], steps[:, second])
    # Signs do not matter for the choice; rounding keeps it the same where two directions are equally near.
    plane = _PLANES[int(np.argmax(np.round(np.abs(normal), 6)))]
    along_w, along_h, along_s = _DIRECTIONS[plane]

    def nearness(w: int, h: int) -> float:
        return round(abs(float(along_w @ steps[:, w])) + abs(float(along_h @ steps[:, h])), 6)

    w, h = max(((first, second), (second, first)), key=lambda pair: nearness(*pair))
    up = normal if normal @ along_s > 0 else -normal
    flipped = (
        bool(along_w @ steps[:, w] < 0), bool(along_h @ steps[:, h] < 0), bool(up @ steps[:, slice_axis] < 0),
    )
    return Turn((w, h, slice_axis), flipped, plane)


def canonical(voxels_WHST: np.ndarray, affine: np.ndarray, slice_axis: int) -> tuple[np.ndarray, np.ndarray, Plane]:
    """Turn voxels to canonical orientation.

    Args:
        voxels_WHST: the three axes of the affine in their order, whatever they are, then time where there is one.
        affine: 4 x 4, voxel index to mm in RAS.
        slice_axis: which of the three axes runs from slice to slice.

    Returns:
        voxels_TSHW, a view; the affine of (w, h, s), 4 x 4; the plane.

    Raises:
        ValueError: the affine does not span space.
    """
    turn = find_turn(affine, slice_axis)
    grid = voxels_WHST if voxels_WHST.ndim == 4 else voxels_WHST[..., None]
    turned_WHST = grid.transpose(*turn.axes, 3)
    backwards = tuple(slice(None, None, -1 if flip else None) for flip in turn.flipped)
    return turned_WHST[backwards].transpose(3, 2, 1, 0), turn.affine(affine, grid.shape), turn.plane
