"""Read an fMRI run from a NIfTI file.

Shape suffixes: X, Y, Z voxel axes, T volumes in time.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from megamed.data.fmri.run import FmriRun, finish_run, is_plausible_tr, shape_text
from megamed.utils import UserError

logger = logging.getLogger("megamed.data")

_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}

# What nibabel and the modules below it raise for a file that is cut short or not what it claims to be.
_UNREADABLE = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, OverflowError, zlib.error)


def read_nifti(path: Path) -> FmriRun:
    """Read a `.nii` or `.nii.gz` file (or a NIfTI `.hdr`/`.img` pair) with four dimensions.

    The scaling of the header is applied, the repetition time comes from `pixdim[4]` in the unit that
    `xyzt_units` names, and the axes are turned to closest canonical RAS.

    Raises:
        UserError: missing, unreadable or cut short, not NIfTI, fewer than two volumes, voxels that
            are not plain or not finite numbers, no usable repetition time.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; set data.path to a NIfTI file or a folder of DICOM files")
    try:
        image = nibabel.load(path)
    except _UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as NIfTI ({error}); give a whole .nii or .nii.gz file, or the folder of "
            "a run's DICOM files"
        ) from error
    # The base of every NIfTI class that nibabel has, NIfTI-2 included.
    if not isinstance(image, nibabel.Nifti1Pair):
        raise UserError(f"{path} is a {type(image).__name__}, not NIfTI; convert it to .nii or .nii.gz")
    signal_XYZT = _signal(image, path)
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= _MILLIMETRES[_units(image.header, path)[0]]
    if image.header["qform_code"] == 0 and image.header["sform_code"] == 0:
        logger.warning(
            "%s does not say how its axes lie in the patient; left and right may be swapped", path.name
        )
    return finish_run(signal_XYZT, affine, _repetition_time(image.header, path), path)


def _signal(image: nibabel.Nifti1Pair, path: Path) -> np.ndarray:
    """The scaled voxels, float32 [X, Y, Z, T]."""
    shape = image.shape
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 4:
        raise UserError(
            f"{path} has {len(shape)} dimensions ({shape_text(shape)}); a run has four: X, Y, Z and time"
        )
    num_volumes = shape[3] if len(shape) == 4 else 1
    if num_volumes < 2:
        raise UserError(
            f"{path} has {num_volumes or 'no'} volume ({shape_text(shape[:3])}); a run needs at least 2 "
            "volumes, so give a 4D file or merge the volumes of the run into one"
        )
    if 0 in shape:
        raise UserError(f"{path} is empty ({shape_text(shape)}); give a file with voxels")
    if image.get_data_dtype().kind not in "iuf":
        raise UserError(
            f"{path} has colour or complex voxels ({image.get_data_dtype()}); give the magnitude images as "
            "plain numbers"
        )
    try:
        signal = image.get_fdata(caching="unchanged", dtype=np.float32)
    except _UNREADABLE as error:
        raise UserError(f"{path} is cut short or damaged ({error}); copy or convert it again") from error
    return signal.reshape(shape, order="A")


def _units(header: nibabel.Nifti1Header, path: Path) -> tuple[str, str]:
    """Names of the units in space and time, as nibabel spells them."""
    try:
        space, time = header.get_xyzt_units()
    except KeyError as error:
        raise UserError(
            f"{path} has no valid units (xyzt_units is {int(header['xyzt_units'])}); set them to mm and sec, "
            "for instance with nibabel's header.set_xyzt_units"
        ) from error
    return str(space), str(time)


def _repetition_time(header: nibabel.Nifti1Header, path: Path) -> float:
    """Seconds from volume to volume, out of `pixdim[4]` and `xyzt_units`.

    Converters are known to write milliseconds under the unit "sec" and the reverse. A value that no
    functional run has in the unit named is read in the unit in which it is plausible, with a warning.
    """
    value = float(header["pixdim"][4])
    _, unit = _units(header, path)
    mend = "write the repetition time in seconds into pixdim[4], for instance with nibabel's header.set_zooms"
    if not np.isfinite(value) or value <= 0:
        raise UserError(f"{path} has no repetition time (pixdim[4] is {value:g}); {mend}")
    if unit not in ("unknown", *_SECONDS):
        raise UserError(f"{path} has {unit} on its fourth axis, not time; give a run in time")
    stated = "sec" if unit == "unknown" else unit
    for candidate in (stated, *_SECONDS):
        seconds = value * _SECONDS[candidate]
        if is_plausible_tr(seconds):
            if candidate != stated:
                logger.warning(
                    "%s gives its repetition time as %g %s, which no functional run has; read as %g %s",
                    path.name, value, stated, value, candidate,
                )
            return seconds
    raise UserError(f"{path} has an impossible repetition time (pixdim[4] is {value:g} {unit}); {mend}")
