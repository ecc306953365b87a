"""Real series: what an independent converter made of them, and where each file's header puts its pixels."""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from megamed.data.orientation import canonical
from megamed.data.readers import Refusal
from megamed.data.series import Series
from tests.data.readers.dicom_files import PSEUDONYMS, READER, look
from tests.real_data import SHARED, needs

SYNTAXES = SHARED / "mr_transfer_syntaxes"


@needs("mr_transfer_syntaxes")
@pytest.mark.parametrize("number", range(1, 10))
def test_nine_transfer_syntaxes_are_as_dcm2niix_has_them(number):
    """Mosaics of one acquisition; the files have UIDs in common, so each is read alone."""
    header = READER.metadata(SYNTAXES / "In" / f"{number}.dcm", PSEUDONYMS)
    series = READER.read(READER.group([header]).plans[0])
    reference = nibabel.load(SYNTAXES / "Ref" / f"{number}.nii")
    expected, affine, plane = canonical(np.asanyarray(reference.dataobj), reference.affine, 2)
    np.testing.assert_array_equal(series.voxels_TSHW, expected)
    # NIfTI keeps the affine in float32; a voxel index of 64 times 3.25 mm is rounded to 1e-5 mm.
    np.testing.assert_allclose(series.info.affine, affine, atol=1e-4)
    assert series.info.plane == plane and series.info.repetition_time_s == float(reference.header["pixdim"][4]) == 3.0
    assert series.info.echo_time_ms == 30 and series.info.field_strength_t == 3 and series.info.flip_angle_deg == 76


def check_every_pixel(series: Series, folder: Path, volume_of=lambda header: 0) -> np.ndarray:
    """Equation C.7.6.2.1-1 of PS3.3 for each file: the place of each corner.

    Slices of an irregular stack lie where `slice_positions_mm` puts them along the stack. Returns the stored numbers
    in the order of the voxels.
    """
    info, stored = series.info, np.zeros(series.voxels_TSHW.shape, np.int64)
    affine = np.array(info.affine)
    normal = np.cross(affine[:3, 1], affine[:3, 0])
    normal = normal / np.linalg.norm(normal) * np.sign(normal @ affine[:3, 2])
    slope = affine[:3, 2] / (affine[:3, 2] @ normal)
    positions = info.slice_positions_mm or np.arange(info.shape[1]) * float(affine[:3, 2] @ normal)
    seen = set()
    for path in sorted(path for path in folder.rglob("*") if path.name not in ("DIRFILE",)):
        header = pydicom.dcmread(path)
        first, second = np.split(np.array(header.ImageOrientationPatient, float), 2)
        first, second = first * header.PixelSpacing[1], second * header.PixelSpacing[0]
        to_ras = np.diag([-1.0, -1.0, 1.0])
        origin = to_ras @ np.array(header.ImagePositionPatient, float)
        s = int(np.argmin(np.abs(np.array(positions) - (origin - affine[:3, 3]) @ normal)))
        slice_origin = affine[:3, 3] + slope * positions[s]
        for row in (0, header.Rows - 1):
            for column in (0, header.Columns - 1):
                place = origin + to_ras @ (first * column + second * row)
                # In axial slices of a supine patient, head first, W and H are columns and rows as they stand.
                expected = slice_origin + affine[:3, 0] * column + affine[:3, 1] * row
                # Positions are written to 1e-5 mm and better, those of slices kept to 1e-4 mm.
                np.testing.assert_allclose(place, expected, atol=1e-3)
        t = volume_of(header)
        stored[t, s] = header.pixel_array
        seen.add((t, s))
    assert len(seen) == info.shape[0] * info.shape[1]
    return stored


@needs("ct_head_ge")
def test_ct_head_with_tilt_and_irregular_spacing():
    folder = SHARED / "ct_head_ge" / "In" / "GE"
    found = look(folder)
    series, info = found.only, found.only.info
    assert not found.refused and info.shape == (1, 28, 512, 512) and info.dtype == "int16" and info.units == "HU"
    stored = check_every_pixel(series, folder)
    outside = stored == -1500
    assert outside.mean() > 0.1
    np.testing.assert_array_equal(series.voxels_TSHW[~outside], stored[~outside])  # slope 1, intercept 0
    assert set(np.unique(series.voxels_TSHW[outside])) == {stored[~outside].min()}
    assert info.gantry_tilt_deg == 18.5  # the header's own GantryDetectorTilt
    gaps = np.diff(info.slice_positions_mm)
    assert (round(gaps.min(), 2), round(gaps.max(), 2)) == (1.08, 7.0)
    assert info.notes == ("slices lie 1.08 to 7.00 mm apart",)
    # 4.22 mm of table at 18.5 degrees.
    assert info.spacing_mm == pytest.approx((0.48828, 0.48828, 4.22 * np.cos(np.deg2rad(18.5))), abs=1e-3)
    assert info.windows == ((35.0, 100.0),) and info.body_part == "HEAD" and info.plane == "axial"


@needs("ct_phantom")
def test_ct_phantom_without_file_names():
    folder = SHARED / "ct_phantom" / "In" / "Philips" / "S21570" / "S2010"
    found = look(folder)
    series, info = found.only, found.only.info
    assert found.refused == {"not-an-image": 1} and "DICOMDIR" in found.refusals[0].reason
    assert info.shape == (1, 28, 512, 512) and info.slice_positions_mm is None and info.gantry_tilt_deg == 0
    np.testing.assert_array_equal(series.voxels_TSHW, check_every_pixel(series, folder) - 1024)
    assert info.spacing_mm == (0.451172, 0.451172, 5.0) and info.windows == ((40.0, 80.0),)
    with pytest.raises(Refusal, match="DICOMDIR"):
        READER.metadata(folder / "DIRFILE", PSEUDONYMS)


@needs("fmri_dicom")
def test_fmri_run():
    folder = SHARED / "fmri_dicom" / "dicoms"
    found = look(folder)
    series, info = found.only, found.only.info
    assert not found.refused and info.kind == "run" and info.shape == (18, 35, 80, 80)
    stored = check_every_pixel(series, folder, lambda header: int(header.TemporalPositionIdentifier) - 1)
    np.testing.assert_array_equal(series.voxels_TSHW, stored)
    assert info.repetition_time_s == 2.0 and info.spacing_mm == (3.0, 3.0, 3.3) and info.b_values == ()
    assert len(found.grouping.plans[0].headers) == 630
