"""Read an fMRI run from a folder of single-frame DICOM MR files.

The result follows the same conventions as a NIfTI file: axes X, Y, Z, T, millimetres, closest
canonical RAS. DICOM's own patient axes are LPS (PS3.3, C.7.6.2).

Shape suffixes: X columns, Y rows, Z slices, T volumes in time.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from megamed.data.fmri.run import FmriRun, finish_run, is_plausible_tr
from megamed.utils import UserError

logger = logging.getLogger("megamed.data")

_MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
_MULTI_FRAME_MR = ("1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4")
_CONVERT = "convert the series to NIfTI, for instance with dcm2niix, and give that file"

# Two positions along the stack closer than this are one slice: far above rounding in the headers, far below
# the spacing of any fMRI.
_SAME_SLICE_MM = 0.05

# Only these are read of a header; the rest, the patient's data included, never enters memory.
_TAGS = (
    "SOPClassUID SOPInstanceUID SeriesInstanceUID ImageType Rows Columns SamplesPerPixel BitsAllocated "
    "BitsStored HighBit PixelRepresentation PhotometricInterpretation NumberOfFrames ImagePositionPatient "
    "ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices RepetitionTime EchoTime "
    "TemporalPositionIdentifier AcquisitionNumber AcquisitionDate AcquisitionTime InstanceNumber "
    "RescaleSlope RescaleIntercept PixelData"
).split()

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")


@dataclass(frozen=True)
class _Slice:
    """One file: its header with the pixels, and where it lies."""

    path: Path
    header: Dataset
    orientation: tuple[float, ...]
    distance_mm: float  # ImagePositionPatient projected on the normal of the slice


def read_dicom_folder(folder: Path) -> FmriRun:
    """Read the run that lies in a folder and the folders below it.

    Files that are not DICOM, and DICOM files that are not MR images, are passed over. Of several
    series the only one with more than one volume is taken. Slices are sorted by
    ImagePositionPatient along the slice normal, never by name or InstanceNumber; spacing comes from
    those positions. Rescale slope and intercept are applied file by file.

    Raises:
        UserError: nothing to read, a damaged file, Siemens mosaics or multi-frame files, no run or
            several, a single volume, incomplete volumes, irregular slices, no repetition time.
    """
    files = _mr_files(folder)
    slices = _choose_series([_locate(path, header) for path, header in files], folder)
    _check_alike(slices, folder)
    stack = _sort_into_volumes(slices, folder)
    first = stack[0][0].header
    shape = (int(first.Columns), int(first.Rows), len(stack[0]), len(stack))
    signal_XYZT = np.empty(shape, np.float32, order="F")
    for t, volume in enumerate(stack):
        for z, one in enumerate(volume):
            signal_XYZT[:, :, z, t] = _pixels(one).T
    run = finish_run(signal_XYZT, _affine(stack[0], folder), _repetition_time(first, folder), folder)
    logger.info(
        "read a DICOM run of %d volumes x %d slices, repetition time %g s",
        len(stack), len(stack[0]), run.repetition_time_s,
    )
    return run


def _mr_files(folder: Path) -> list[tuple[Path, Dataset]]:
    """Every single-frame MR image below the folder, each object once."""
    everything = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    paths = sorted(path for path in everything if not path.name.startswith("."))
    if not paths:
        raise UserError(f"{folder} is empty; give the folder that holds the DICOM files of the run")
    found: dict[str, tuple[Path, Dataset]] = {}
    num_dicom = num_unread = num_twice = 0
    for path in paths:
        header = _header(path)
        if header is None:
            continue
        num_dicom += 1
        if not _is_mr_image(header, path):
            continue
        if _is_many_slices(header):
            num_unread += 1
            continue
        uid = str(header.get("SOPInstanceUID") or path)
        num_twice += uid in found
        found.setdefault(uid, (path, header))
    if num_unread:
        raise UserError(
            f"{folder} has {num_unread} Siemens mosaic or multi-frame files, which are not read yet; "
            f"{_CONVERT}"
        )
    if not found:
        raise UserError(
            f"{folder} has no DICOM MR image ({len(paths)} files, {num_dicom} of them DICOM); give the "
            "folder that holds the MR files of the run"
        )
    if num_twice:
        logger.warning("%d files repeat a SOPInstanceUID already read and are passed over", num_twice)
    return list(found.values())


def _header(path: Path) -> Dataset | None:
    """The header with pixels, or None for a file that is not DICOM."""
    try:
        return pydicom.dcmread(path, specific_tags=list(_TAGS))
    except InvalidDicomError:
        return None
    except Exception as error:  # a damaged file makes pydicom raise whatever its bytes lead it to
        raise UserError(
            f"{path} cannot be read as DICOM ({type(error).__name__}); copy it again, or take it out of the "
            "folder"
        ) from error


def _is_mr_image(header: Dataset, path: Path) -> bool:
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    if kind is not None and kind not in (_MR_IMAGE, *_MULTI_FRAME_MR):
        return False
    if kind is None or "PixelData" not in header:
        raise UserError(f"{path} ends before its pixels; copy it again, or take it out of the folder")
    return int(header.get("SamplesPerPixel", 1)) == 1


def _is_many_slices(header: Dataset) -> bool:
    """Whether one file holds more than one slice."""
    frames = int(header.get("NumberOfFrames") or 1)
    return header.SOPClassUID in _MULTI_FRAME_MR or frames > 1 or "MOSAIC" in (header.get("ImageType") or ())


def _locate(path: Path, header: Dataset) -> _Slice:
    missing = [name for name in (*_GEOMETRY, "SeriesInstanceUID") if header.get(name) in (None, "")]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; export the series again, or take the file out")
    try:
        orientation = tuple(float(value) for value in header.ImageOrientationPatient)
        normal = np.cross(orientation[:3], orientation[3:])
        return _Slice(path, header, orientation, float(normal @ _position(header)))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} has a position or orientation that is not three or six numbers; export the series "
            "again, or take the file out"
        ) from error


def _position(header: Dataset) -> np.ndarray:
    return np.array([float(value) for value in header.ImagePositionPatient])


def _choose_series(slices: Sequence[_Slice], folder: Path) -> list[_Slice]:
    """The files of the only series in which a slice was taken more than once."""
    series: dict[str, list[_Slice]] = {}
    for one in slices:
        series.setdefault(str(one.header.SeriesInstanceUID), []).append(one)
    runs = [members for members in series.values() if _most_at_one_place(members) > 1]
    if len(runs) == 1:
        if len(series) > 1:
            logger.info("%d of %d series has more than one volume and is read", len(runs), len(series))
        return runs[0]
    if runs:
        raise UserError(
            f"{folder} has {len(runs)} series with more than one volume; put the files of one run into a "
            "folder of their own"
        )
    raise UserError(
        f"{folder} has a single volume ({len(slices)} MR files, each of another slice); a run needs at least "
        "2 volumes, so give the folder with all files of the run"
    )


def _most_at_one_place(slices: Sequence[_Slice]) -> int:
    places = Counter((tuple(np.round(one.orientation, 3)), round(one.distance_mm, 2)) for one in slices)
    return max(places.values())


def _check_alike(slices: Sequence[_Slice], folder: Path) -> None:
    """Refuse a series that is not one grid measured again and again in the same way."""
    first = slices[0]

    def differ(value: Callable[[_Slice], Any]) -> bool:
        return any(value(one) != value(first) for one in slices)

    if differ(lambda one: (one.header.Rows, one.header.Columns)) or any(
        not np.allclose(one.orientation, first.orientation, atol=1e-3)
        or not np.allclose(one.header.PixelSpacing, first.header.PixelSpacing, rtol=1e-3)
        for one in slices
    ):
        raise UserError(
            f"{folder} has slices of different size, pixel spacing or orientation in one series; put the "
            "files of the run alone into a folder"
        )
    # Values 3 and 4 of ImageType tell magnitude from phase.
    if differ(lambda one: tuple(one.header.get("ImageType") or ())[2:4]) or differ(
        lambda one: one.header.get("EchoTime")
    ):
        raise UserError(
            f"{folder} mixes several echo times or image types (magnitude and phase, say) in one series; put "
            "the files of one of them into a folder of their own"
        )


def _sort_into_volumes(slices: list[_Slice], folder: Path) -> list[list[_Slice]]:
    """Volumes in time, each a list of slices in the direction of the slice normal."""
    places: list[list[_Slice]] = []
    for one in sorted(slices, key=lambda one: one.distance_mm):
        if not places or one.distance_mm - places[-1][-1].distance_mm > _SAME_SLICE_MM:
            places.append([])
        places[-1].append(one)
    num_volumes = max(len(place) for place in places)
    key = next((key for key in _TIME_KEYS if _tells_volumes(key, places, num_volumes)), None)
    if key is None:
        # The header does not say which volume a slice is of. Scanners number images so that at one place the
        # numbers rise with time, whether they count slice by slice or volume by volume.
        for place in places:
            if any(one.header.get("InstanceNumber") is None for one in place):
                raise UserError(f"{folder} has files without any sign of their order in time; {_CONVERT}")
            place.sort(key=lambda one: int(one.header.InstanceNumber))
        volumes = [[place[t] for place in places if t < len(place)] for t in range(num_volumes)]
    else:
        times = sorted({key(one.header) for place in places for one in place})
        index = {time: t for t, time in enumerate(times)}
        volumes = [[] for _ in times]
        for place in places:
            for one in place:
                volumes[index[key(one.header)]].append(one)
    short = [(t, len(volume)) for t, volume in enumerate(volumes) if len(volume) < len(places)]
    if short:
        t, count = short[0]
        raise UserError(
            f"{folder} has {len(short)} of {len(volumes)} volumes incomplete (volume {t + 1} has {count} of "
            f"{len(places)} slices); copy the missing files, or take out those of the incomplete volumes"
        )
    return volumes


def _temporal_position(header: Dataset) -> Any:
    return header.get("TemporalPositionIdentifier")


def _acquisition_number(header: Dataset) -> Any:
    return header.get("AcquisitionNumber")


def _acquisition_time(header: Dataset) -> Any:
    time = header.get("AcquisitionTime")
    return None if time in (None, "") else (str(header.get("AcquisitionDate") or ""), float(time))


# What may say of which volume a slice is, the most explicit first.
_TIME_KEYS = (_temporal_position, _acquisition_number, _acquisition_time)


def _tells_volumes(
    key: Callable[[Dataset], Any], places: Sequence[Sequence[_Slice]], num_volumes: int
) -> bool:
    """Whether each file has the key, no value comes twice at one place, and a value stands for a volume.

    AcquisitionNumber is the same throughout a Philips run, and AcquisitionTime differs from slice
    to slice on other scanners; neither then says anything about volumes. TemporalPositionIdentifier
    means the volume and nothing else.
    """
    values: list[list[Hashable]] = [[key(one.header) for one in place] for place in places]
    distinct = {value for place in values for value in place}
    is_of_volumes = key is _temporal_position or len(distinct) == num_volumes
    return None not in distinct and is_of_volumes and all(len(set(p)) == len(p) for p in values)


def _pixels(one: _Slice) -> np.ndarray:
    """Rescaled pixels, float32 [rows, columns]."""
    try:
        stored = one.header.pixel_array
    except Exception as error:  # a decoder raises whatever damaged pixels lead it to
        syntax = one.header.file_meta.TransferSyntaxUID.name
        raise UserError(
            f"{one.path} has pixels that cannot be decoded ({syntax}: {error}); copy the file again, or "
            "install the decoder for it (python-gdcm, pyjpegls, pylibjpeg-openjpeg or pylibjpeg-rle)"
        ) from error
    slope = float(one.header.get("RescaleSlope", 1) or 1)
    intercept = float(one.header.get("RescaleIntercept", 0) or 0)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _affine(volume: Sequence[_Slice], folder: Path) -> np.ndarray:
    """Voxel index (column, row, slice) to mm in RAS, 4 x 4."""
    header = volume[0].header
    row_spacing, column_spacing = (float(value) for value in header.PixelSpacing)
    along_row, along_column = np.array(volume[0].orientation[:3]), np.array(volume[0].orientation[3:])
    if len(volume) > 1:
        gaps = np.diff([one.distance_mm for one in volume])
        if np.ptp(gaps) > max(2 * _SAME_SLICE_MM, 0.01 * gaps.min()):
            raise UserError(
                f"{folder} has slices {gaps.min():.2f} to {gaps.max():.2f} mm apart; a slice is missing in "
                "every volume, so copy the series again"
            )
        step = (_position(volume[-1].header) - _position(header)) / (len(volume) - 1)
    else:
        thickness = float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1.0)
        step = np.cross(along_row, along_column) * thickness
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = along_column * row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = _position(header)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _repetition_time(header: Dataset, folder: Path) -> float:
    """Seconds from volume to volume, from RepetitionTime in milliseconds."""
    value = float(header.get("RepetitionTime") or 0.0)
    if is_plausible_tr(value / 1000):
        return value / 1000
    if is_plausible_tr(value):
        logger.warning("RepetitionTime is %g ms, which no functional run has; read as seconds", value)
        return value
    raise UserError(
        f"{folder} has an impossible RepetitionTime ({value:g} ms); {_CONVERT} with the time set in pixdim[4]"
    )
