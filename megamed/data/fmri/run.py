"""An fMRI run in memory, whatever it was read from.

Shape suffixes: X left to right, Y back to front, Z feet to head (RAS+), T volumes in time.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import FileHeader, Refusal
from megamed.data.readers.dicom import DicomReader
from megamed.data.series import Series
from megamed.utils import UserError

logger = logging.getLogger("megamed.data")

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
    # It imports this file for FmriRun, so it is imported here and not at the top.
    from megamed.data.fmri.nifti import read_nifti

    if str(path) == NIBABEL_RUN:
        return read_nifti(Path(nibabel.__file__).parent / "tests" / "data" / "functional.nii")
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_dicom_folder(place)
    return read_nifti(place)


# Refusals of files that are no MR image of the run, or no file of it: passed over.
_NOT_OF_THE_RUN = (
    "not-dicom", "not-an-image", "unsupported-class", "secondary-capture", "ultrasound", "burned-in-annotation",
    "burned-in-unknown", "recognizable", "localizer", "film",
)


def _read_dicom_folder(folder: Path) -> FmriRun:
    """Read the run that lies in a folder and the folders below it.

    Files that are not DICOM, and DICOM files that are not MR images, are passed over. Of several series the only one
    with more than one volume is taken.

    Raises:
        UserError: nothing to read, a damaged file, no run or several, incomplete volumes, irregular slices, no
            repetition time.
    """
    # One key for each reading: nothing that it hides is kept.
    reader, pseudonyms = DicomReader(), Pseudonyms(secrets.token_bytes(32))
    headers = _mr_headers(folder, reader, pseudonyms)
    grouping = reader.group(headers)
    num_twice = sum(refusal.code == "duplicate" for _, refusal in grouping.refused)
    if num_twice:
        logger.warning("%d files repeat a SOPInstanceUID already read and are passed over", num_twice)
    try:
        series = [reader.read(plan) for plan in grouping.plans]
    except Refusal as refusal:
        raise UserError(f"{refusal.file or folder}: {refusal}") from None
    runs = [one for one in series if one.info.kind == "run"]
    if len(runs) > 1:
        labels = "; ".join(run.info.part for run in runs if run.info.part)
        raise UserError(
            f"{folder} has {len(runs)} runs with more than one volume{f' ({labels})' if labels else ''}; put the files "
            "of one run into a folder of their own"
        )
    if not runs:
        faults = [refusal for _, refusal in grouping.refused if refusal.code != "duplicate"]
        if faults:
            raise UserError(f"{folder} cannot be read as a run: {faults[0]}")
        raise UserError(
            f"{folder} has a single volume ({len(headers)} MR files); a run needs at least 2 volumes, so give the "
            "folder with all files of the run"
        )
    if len(series) > 1:
        logger.info("1 of %d series has more than one volume and is read", len(series))
    return _as_run(runs[0], folder)


def _mr_headers(folder: Path, reader: DicomReader, pseudonyms: Pseudonyms) -> list[FileHeader]:
    """Headers of the MR images below the folder."""
    everything = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    paths = sorted(path for path in everything if not path.name.startswith("."))
    if not paths:
        raise UserError(f"{folder} is empty; give the folder that holds the DICOM files of the run")
    headers, num_dicom = [], 0
    for path in paths:
        try:
            header = reader.metadata(path, pseudonyms)
        except Refusal as refusal:
            if refusal.code not in _NOT_OF_THE_RUN:
                raise UserError(f"{path}: {refusal}") from None
            num_dicom += refusal.code != "not-dicom"
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        num_dicom += 1
        if header.facts["modality"] == "MR":
            headers.append(header)
    if not headers:
        raise UserError(
            f"{folder} has no DICOM MR image ({len(paths)} files, {num_dicom} of them DICOM); give the "
            "folder that holds the MR files of the run"
        )
    return headers


def _as_run(series: Series, folder: Path) -> FmriRun:
    """A series on its grid W, H, S, T as a run."""
    info = series.info
    for note in info.notes:
        logger.warning("%s: %s", folder.name, note)
    if info.slice_positions_mm is not None:
        gaps = np.diff(info.slice_positions_mm)
        raise UserError(
            f"{folder} has slices {gaps.min():.2f} to {gaps.max():.2f} mm apart; a slice is missing in every volume, "
            "so copy the series again"
        )
    if info.repetition_time_s is None or not is_plausible_tr(info.repetition_time_s):
        raise UserError(
            f"{folder} has no possible RepetitionTime; convert the series to NIfTI, for instance with dcm2niix, with "
            "the time set in pixdim[4]"
        )
    logger.info(
        "read a DICOM run of %d volumes x %d slices, repetition time %g s", *info.shape[:2], info.repetition_time_s
    )
    signal_WHST = series.voxels_TSHW.transpose(3, 2, 1, 0)
    return finish_run(signal_WHST, np.array(info.affine), info.repetition_time_s, folder)


def finish_run(signal_XYZT: np.ndarray, affine: np.ndarray, repetition_time_s: float, path: Path) -> FmriRun:
    """Turn a run to closest canonical RAS and check what every later step relies on.

    Args:
        signal_XYZT: numbers on the grid that `affine` describes; kept as float32.
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
