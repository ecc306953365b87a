"""An fMRI run in memory, whatever it was read from.

Shape suffixes: X left to right, Y back to front, Z feet to head (RAS+), T volumes in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from megamed.utils import UserError

NIBABEL_RUN = "nibabel:functional.nii"

# Repetition times of functional runs, from inverse imaging (0.1 s and less) to sparse sampling and
# perfusion (tens of seconds), lie well inside these bounds; a header off by a factor of 1000 does not.
PLAUSIBLE_TR_S = (0.05, 60.0)


@dataclass(frozen=True, eq=False)
class FmriRun:
    """One functional run.

    Attributes:
        signal_XYZT: float32; the first three axes run to the patient's right, front and head as
            closely as the acquired grid allows (closest canonical RAS).
        affine: 4 x 4, voxel index to mm in RAS (the NIfTI convention).
        voxel_size_mm: edge lengths of a voxel along X, Y, Z.
        repetition_time_s: seconds from one volume to the next.
        source: name of the file or folder it was read from, without its path.
    """

    signal_XYZT: np.ndarray
    affine: np.ndarray
    voxel_size_mm: tuple[float, float, float]
    repetition_time_s: float
    source: str

    @property
    def num_volumes(self) -> int:
        return int(self.signal_XYZT.shape[3])


def read_run(path: str | Path) -> FmriRun:
    """Read a run from a NIfTI file, from a folder of DICOM files, or the one that nibabel ships.

    Args:
        path: file, folder, or `nibabel:functional.nii`.

    Raises:
        UserError: there is nothing at the path, or what is there cannot be used as a run.
    """
    # Both readers import this file for FmriRun, so they are imported here and not at the top.
    from megamed.data.fmri.dicom import read_dicom_folder
    from megamed.data.fmri.nifti import read_nifti

    if str(path) == NIBABEL_RUN:
        return read_nifti(Path(nibabel.__file__).parent / "tests" / "data" / "functional.nii")
    place = Path(path).expanduser()
    if place.is_dir():
        return read_dicom_folder(place)
    return read_nifti(place)


def finish_run(signal_XYZT: np.ndarray, affine: np.ndarray, repetition_time_s: float, path: Path) -> FmriRun:
    """Turn a run to closest canonical RAS and check what every later step relies on.

    Args:
        signal_XYZT: float32, on the grid that `affine` describes.
        affine: 4 x 4, voxel index to mm in RAS.
        repetition_time_s: seconds from one volume to the next.
        path: what was read, for messages; its last part becomes `source`.

    Raises:
        UserError: voxels that are not finite, a broken affine, or no signal above zero.
    """
    num_bad = int(signal_XYZT.size - np.count_nonzero(np.isfinite(signal_XYZT)))
    if num_bad:
        raise UserError(
            f"{path} has {num_bad} voxels that are not finite (NaN or infinite); replace them, for "
            "instance with 0 outside the head, and write the file again"
        )
    orientation = io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if np.isnan(orientation).any():
        raise UserError(f"{path} has an affine that does not span space; write it again with a valid one")
    # A copy of its own, volume after volume: not a view of a file that someone may replace.
    canonical_XYZT = np.array(apply_orientation(signal_XYZT, orientation), dtype=np.float32, order="F")
    affine_ras = affine @ inv_ornt_aff(orientation, signal_XYZT.shape[:3])
    # Of a raw run the mean volume looks like any volume; of a demeaned one nothing is left in it.
    brightness = np.percentile(canonical_XYZT.mean(axis=3), 98)
    if not brightness > 0.1 * np.percentile(np.abs(canonical_XYZT[..., 0]), 98):
        raise UserError(
            f"{path} has no head with signal above zero in its mean volume; percent signal change needs a "
            "run whose mean was not removed, so give the run before demeaning or standardising"
        )
    sizes = np.linalg.norm(affine_ras[:3, :3], axis=0)
    return FmriRun(
        signal_XYZT=canonical_XYZT,
        affine=affine_ras,
        # Headers carry float32 noise: 0.72 s reads 0.7200000286. Four decimals are 0.1 ms and 0.1 um.
        voxel_size_mm=(round(float(sizes[0]), 4), round(float(sizes[1]), 4), round(float(sizes[2]), 4)),
        repetition_time_s=round(repetition_time_s, 4),
        source=path.name,
    )


def is_plausible_tr(repetition_time_s: float) -> bool:
    """Whether a repetition time in seconds can be that of a functional run."""
    return bool(PLAUSIBLE_TR_S[0] <= repetition_time_s <= PLAUSIBLE_TR_S[1])


def shape_text(shape: Sequence[int]) -> str:
    """`17 x 21 x 3` for a message."""
    return " x ".join(str(size) for size in shape)
