"""What the readers make of real files that others publish, compared with an independent reading, as Markdown.

    python tools/reader_tables.py dicom         pydicom's own test files, decoded by other libraries than the reader's
    python tools/reader_tables.py nifti         nibabel's own test files, and dcm2niix's NIfTI where it is there
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import UID

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Refusal
from megamed.data.readers.dicom import DicomReader
from megamed.data.readers.dicom.parse import quiet
from megamed.data.readers.nifti import NiftiReader
from megamed.data.series import Series

PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
NIBABEL_FILES = Path(nibabel.__file__).parent / "tests" / "data"
DCM2NIIX_FILES = Path(__file__).resolve().parents[2] / "shared" / "data" / "mr_transfer_syntaxes" / "Ref"

_KEY = b"of no use but here"

# Axes of RAS that W, H and S run along, and whether against it: the table of `megamed.data.series`.
_FROM_RAS = {
    "axial": ((0, 1, 2), (True, True, False)),
    "coronal": ((0, 2, 1), (True, True, True)),
    "sagittal": ((1, 2, 0), (True, True, True)),
}


class NiftiRow(NamedTuple):
    """One file.

    Attributes:
        file: its name.
        series: as read; None where it was refused or is of another family.
        difference: largest one to nibabel's scaled voxels, as a share of the largest value.
        corner_mm: how far the corners of the volume are from where nibabel's affine has them.
        refusal: why it was refused.
    """

    file: str
    series: Series | None = None
    difference: float = 0.0
    corner_mm: float = 0.0
    refusal: Refusal | None = None


def nifti_rows() -> Iterator[NiftiRow]:
    """Every file of nibabel's tests, by name, then dcm2niix's."""
    reader, pseudonyms = NiftiReader(), Pseudonyms(_KEY)
    others = DCM2NIIX_FILES.glob("*.nii") if DCM2NIIX_FILES.is_dir() else []
    for path in [*sorted(path for path in NIBABEL_FILES.iterdir() if path.is_file()), *sorted(others)]:
        with path.open("rb") as file:
            head = file.read(1024)
        if not reader.can_read(path, head):
            yield NiftiRow(path.name)
            continue
        try:
            series = reader.read(reader.group([reader.metadata(path, pseudonyms)]).plans[0])
            yield NiftiRow(path.name, series, *compared(series, path))
        except Refusal as refusal:
            yield NiftiRow(path.name, refusal=refusal)


def compared(series: Series, path: Path) -> tuple[float, float]:
    """`difference` and `corner_mm` of a row, by nibabel's own scaling, affine and way to canonical RAS."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    axes, flipped = _FROM_RAS[series.info.plane]
    values = np.asarray(image.get_fdata())
    values = values if values.ndim == 4 else values[..., None]
    turned_WHST = np.flip(values.transpose(*axes, 3), tuple(i for i in range(3) if flipped[i]))
    expected_TSHW = turned_WHST.transpose(3, 2, 1, 0)
    difference = np.abs(series.voxels_TSHW - expected_TSHW).max() / max(np.abs(expected_TSHW).max(), 1e-30)
    farthest = 0.0
    shape_WHS = expected_TSHW.shape[:0:-1]
    for corner_WHS in product(*((0, size - 1) for size in shape_WHS)):
        corner_XYZ = np.zeros(3)
        for i, axis in enumerate(axes):
            corner_XYZ[axis] = shape_WHS[i] - 1 - corner_WHS[i] if flipped[i] else corner_WHS[i]
        place = np.array(series.info.affine) @ [*corner_WHS, 1]
        farthest = max(farthest, float(np.abs(place - image.affine @ [*corner_XYZ, 1]).max()))
    return float(difference), farthest


def nifti_table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| file | T x S x H x W | type | plane | difference | corners, mm | refused: reason; mend |"
    yield "|---|---|---|---|---|---|---|"
    for row in nifti_rows():
        if row.series is not None:
            info = row.series.info
            yield (f"| `{row.file}` | {' x '.join(map(str, info.shape))} | {info.dtype} | {info.plane} "
                   f"| {row.difference:.1e} | {row.corner_mm:.1e} | |")
        elif row.refusal is not None:
            yield f"| `{row.file}` | | | | | | `{row.refusal.code}`: {row.refusal} |"
        else:
            yield f"| `{row.file}` | | | | | | not of this family |"


class DicomRow(NamedTuple):
    """One file.

    Attributes:
        file: its path below `PYDICOM_FILES`.
        syntax: its transfer syntax, where it says one.
        marked: read after BurnedInAnnotation was set to NO in a copy, for the pixels' sake.
        series: as read; None where it was refused or is of another family.
        difference: largest one to the values that another decoder gives, at the place where the header puts them; NaN
            where there is no other decoder.
        refusal: why it was refused.
    """

    file: str
    syntax: str = ""
    marked: bool = False
    series: Series | None = None
    difference: float = 0.0
    refusal: Refusal | None = None


# Why a picture is refused whose pixels may name somebody: then a marked copy is read as well.
UNMARKED = ("secondary-capture", "ultrasound")


def dicom_rows() -> Iterator[DicomRow]:
    """Every file of pydicom's tests, by name, each read alone."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        for path in sorted(path for path in PYDICOM_FILES.rglob("*") if path.is_file()):
            name = path.relative_to(PYDICOM_FILES).as_posix()
            row = dicom_row(path, name)
            yield row
            if row.refusal is not None and row.refusal.code in UNMARKED:
                marked = Path(folder) / "marked.dcm"
                mark(path, marked)
                yield dicom_row(marked, name)._replace(marked=True)


def mark(path: Path, copy: Path) -> None:
    """Write a copy that says that nothing is burnt into its pixels."""
    dataset = pydicom.dcmread(path)
    dataset.BurnedInAnnotation = "NO"
    syntax = dataset.file_meta.TransferSyntaxUID
    list(dataset)  # each element gets its VR, which an implicit data set does not have
    if syntax.is_compressed and dataset["PixelData"].VR != "OB":
        dataset["PixelData"].VR = "OB"
    dataset.save_as(copy, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)


def dicom_row(path: Path, name: str) -> DicomRow:
    """Read one file, and compare it."""
    reader = DicomReader()
    with path.open("rb") as file:
        if not reader.can_read(path, file.read(1024)):
            return DicomRow(name)
    meta = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=["SOPClassUID"]).file_meta
    syntax = UID(meta.get("TransferSyntaxUID") or "").name
    try:
        series = reader.read(reader.group([reader.metadata(path, Pseudonyms(_KEY))]).plans[0])
    except Refusal as refusal:
        return DicomRow(name, syntax, refusal=refusal)
    return DicomRow(name, syntax, series=series, difference=dicom_difference(series, path))


def dicom_difference(series: Series, path: Path) -> float:
    """Largest difference of one slice or picture to pydicom's reading of it.

    Another decoder is taken than the reader's where there is one (Pillow, GDCM, pydicom's own for RLE), and each pixel
    is looked up where the position and orientation of the header put it.
    """
    dataset = pydicom.dcmread(path)
    plugins = get_decoder(dataset.file_meta.TransferSyntaxUID).available_plugins
    others: list[Any] = [plugin for plugin in ("pillow", "pydicom", "gdcm") if plugin in plugins] or [""]
    for other in others:
        try:
            pixels = pydicom.pixels.pixel_array(dataset, index=0, decoding_plugin=other)
            break
        except (RuntimeError, NotImplementedError):
            continue
    else:
        return float("nan")
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = pydicom.pixels.apply_color_lut(pixels, dataset) >> 8
    values = apply_modality_lut(pixels, dataset).astype(np.float64)
    if series.info.kind == "image":
        found = series.voxels_TSHW[0, 0].astype(np.float64)
        if series.info.inverted:
            slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
            values = slope * (2**dataset.BitsStored - 1) + 2 * intercept - values
    else:
        rows, columns = np.indices(values.shape)
        along_row, along_column = np.split(np.array(dataset.ImageOrientationPatient, float), 2)
        place = np.array(dataset.ImagePositionPatient, float)[:, None, None]
        place = place + along_row[:, None, None] * dataset.PixelSpacing[1] * columns
        place = place + along_column[:, None, None] * dataset.PixelSpacing[0] * rows
        to_voxel = np.linalg.inv(np.array(series.info.affine)) @ np.diag([-1, -1, 1, 1])
        w, h, _ = np.rint(np.tensordot(to_voxel[:3, :3], place, 1) + to_voxel[:3, 3, None, None]).astype(int)
        found = series.voxels_TSHW[0, 0, h, w].astype(np.float64)
    if "PixelPaddingValue" in dataset:
        # What lies between padding and vacuum is padding that was compressed.
        padding = dataset.PixelPaddingValue * dataset.RescaleSlope + dataset.RescaleIntercept
        values[values <= (padding - 1024) / 2] = found[values <= (padding - 1024) / 2]
    return float(np.abs(found - values).max())


def dicom_table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| file | transfer syntax | read as | T x S x H x W | lowest to highest | difference | refused |"
    yield "|---|---|---|---|---|---|---|"
    for row in dicom_rows():
        name = f"`{row.file}`" + (", marked" if row.marked else "")
        if row.series is not None:
            info, voxels = row.series.info, row.series.voxels_TSHW
            yield (f"| {name} | {row.syntax} | {info.modality} {info.kind}, {info.dtype} "
                   f"| {' x '.join(map(str, info.shape))} | {voxels.min():g} to {voxels.max():g} "
                   f"| {'no other decoder' if math.isnan(row.difference) else f'{row.difference:g}'} | |")
        elif row.refusal is not None:
            yield f"| {name} | {row.syntax} | | | | | `{row.refusal.code}`: {row.refusal.reason} |"
        else:
            yield f"| {name} | | | | | | not DICOM |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {"dicom": dicom_table, "nifti": nifti_table}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES))
    for line in TABLES[parser.parse_args().table]():
        print(line)


if __name__ == "__main__":
    main()
