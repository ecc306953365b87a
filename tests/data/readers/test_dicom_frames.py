"""Several slices in one file: enhanced objects, Siemens mosaics, nuclear medicine."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from tests.data.readers.dicom_files import (
    COLUMNS,
    ROWS,
    axial,
    change,
    enhanced,
    frame,
    image,
    item,
    look,
    pixels,
    save,
)

# Frames in no order: the last volume first, slices mixed.
ORDER = [(z, t) for t in (2, 0, 1) for z in (1, 0, 2)]


def test_a_run_with_its_rescale_in_the_shared_groups(tmp_path):
    found = look(save(tmp_path, [enhanced([frame(z, t) for z, t in ORDER], [pixels(z, t) for z, t in ORDER])]))
    info = found.only.info
    expected = axial([[2 * pixels(z, t) - 7 for z in range(3)] for t in range(3)])
    np.testing.assert_array_equal(found.only.voxels_TSHW, expected)
    assert (info.kind, info.plane, info.spacing_mm) == ("run", "axial", (2.0, 3.0, 4.0))
    assert info.repetition_time_s == 1.5 and info.flip_angle_deg == 70 and info.windows == ((300.0, 600.0),)


def test_per_frame_rescale_of_ct(tmp_path):
    slopes = [1, 2, 1]
    rescales = [item(RescaleSlope=slope, RescaleIntercept=-1024, RescaleType="HU") for slope in slopes]
    frames = [frame(z, PixelValueTransformationSequence=rescales[z]) for z in range(3)]
    found = look(save(tmp_path, [enhanced(frames, [pixels(z) for z in range(3)], "2.1", Modality="CT")]))
    expected = axial([[slopes[z] * pixels(z) - 1024 for z in range(3)]])
    np.testing.assert_array_equal(found.only.voxels_TSHW, expected)
    assert found.only.info.units == "HU" and found.only.info.kind == "volume"


def test_dimensions_tell_volumes_where_no_index_does(tmp_path):
    """Diffusion directions of one b-value, told by a dimension of their own."""
    pointers = [Tag("StackID"), Tag("InStackPositionNumber"), Tag("DiffusionGradientOrientation")]
    dimensions = Sequence([item(DimensionIndexPointer=pointer)[0] for pointer in pointers])
    frames, stored = [], []
    for z, t in ORDER:
        content = item(StackID="1", InStackPositionNumber=z + 1, DimensionIndexValues=[1, z + 1, t + 1])
        frames.append(frame(z, FrameContentSequence=content, MRDiffusionSequence=item(DiffusionBValue=800.0)))
        stored.append(pixels(z, t))
    found = look(save(tmp_path, [enhanced(frames, stored, DimensionIndexSequence=dimensions)]))
    np.testing.assert_array_equal(
        found.only.voxels_TSHW, axial([[2 * pixels(z, t) - 7 for z in range(3)] for t in range(3)])
    )
    assert found.only.info.b_values == (800.0,) * 3


def test_one_file_with_several_stacks(tmp_path):
    """Echoes, and magnitude and phase, in one object: a plan each, in which the file stands every time."""
    frames, stored = [], []
    for t, (echo, kind) in enumerate(((10.0, "M"), (20.0, "M"), (10.0, "P"))):
        for z in range(3):
            frame_type = item(FrameType=["ORIGINAL", "PRIMARY", kind, "NONE"])
            frames.append(frame(z, MREchoSequence=item(EffectiveEchoTime=echo), MRImageFrameTypeSequence=frame_type))
            stored.append(pixels(z, t))
    found = look(save(tmp_path, [enhanced(frames, stored)]))
    by_label = {series.info.part: series for series in found.series.values()}
    assert set(by_label) == {"TE 10 ms, M", "TE 20 ms, M", "TE 10 ms, P"}
    for t, label in enumerate(("TE 10 ms, M", "TE 20 ms, M", "TE 10 ms, P")):
        expected = axial([[2 * pixels(z, t) - 7 for z in range(3)]])
        np.testing.assert_array_equal(by_label[label].voxels_TSHW, expected)
    assert by_label["TE 20 ms, M"].info.echo_time_ms == 20


def test_a_concatenation_is_whole_or_refused(tmp_path):
    parts = []
    for number in (1, 2):
        places = [(z, number - 1) for z in range(3)]
        parts.append(enhanced(
            [frame(z, t) for z, t in places], [pixels(z, t) for z, t in places], ConcatenationUID="1.2.826.77.9",
            InConcatenationNumber=number, InConcatenationTotalNumber=2,
        ))
    found = look(save(tmp_path / "whole", parts))
    np.testing.assert_array_equal(
        found.only.voxels_TSHW, axial([[2 * pixels(z, t) - 7 for z in range(3)] for t in range(2)])
    )
    assert look(save(tmp_path / "part", parts[:1])).refused == {"incomplete-concatenation": 1}


def test_frames_without_a_description(tmp_path):
    header = enhanced([frame(z) for z in range(3)], [pixels(z) for z in range(3)])
    header.PerFrameFunctionalGroupsSequence = header.PerFrameFunctionalGroupsSequence[:2]
    assert look(save(tmp_path, [header])).refused == {"no-geometry": 1}


def csa(**fields: list[str]) -> bytes:
    """A CSA header of the second kind."""
    content = b"SV10\4\3\2\1" + len(fields).to_bytes(4, "little") + (77).to_bytes(4, "little")
    for name, values in fields.items():
        content += name.encode().ljust(64, b"\0") + b"\3\0\0\0" + b"FD\0\0" + b"\0" * 4
        content += len(values).to_bytes(4, "little") + (77).to_bytes(4, "little")
        for value in values:
            text = value.encode() + b"\0"
            content += b"".join(n.to_bytes(4, "little") for n in (len(text), len(text), 77, 0))
            content += text.ljust(-(-len(text) // 4) * 4, b"\0")
    return content


def mosaic(t: int, count: int = 5, upwards: bool = True, **changes) -> Dataset:
    """Volume t as tiles of a 3 x 3 mosaic; the slices go up, or down against the normal of the orientation."""
    stored = np.zeros((3 * ROWS, 3 * COLUMNS), "<u2")
    for z in range(count):
        top, left = z // 3 * ROWS, z % 3 * COLUMNS
        stored[top : top + ROWS, left : left + COLUMNS] = pixels(z, t)
    # As if the whole mosaic were centred on the first slice, whose first pixel is at (-10, -20, 5).
    position = [-10 - COLUMNS * 2, -20 - ROWS * 3, 5]
    header = image(
        "4", "MR", stored, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], PixelSpacing=[3, 2],
        SliceThickness=3, SpacingBetweenSlices=4, ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ImagePositionPatient=position, RepetitionTime=1500, EchoTime=30, AcquisitionNumber=t + 1,
    )
    block = header.private_block(0x29, "SIEMENS CSA HEADER", create=True)
    normal = ["0", "0", "1" if upwards else "-1"]
    block.add_new(0x10, "OB", csa(NumberOfImagesInMosaic=[f"{count}"], SliceNormalVector=normal, B_value=["700"]))
    return change(header, **changes)


@pytest.mark.parametrize("upwards", [True, False])
def test_mosaics_of_several_volumes(tmp_path, upwards):
    found = look(save(tmp_path, [mosaic(t, upwards=upwards) for t in range(3)]))
    info = found.only.info
    slices = range(5) if upwards else range(4, -1, -1)
    np.testing.assert_array_equal(found.only.voxels_TSHW, axial([[pixels(z, t) for z in slices] for t in range(3)]))
    assert (info.kind, info.shape, info.spacing_mm) == ("run", (3, 5, 4, 5), (2.0, 3.0, 4.0))
    np.testing.assert_allclose(np.array(info.affine)[:3, 3], [10, 20, 5 if upwards else 5 - 16], atol=1e-12)
    assert info.repetition_time_s == 1.5 and info.b_values == (700.0,) * 3


def test_mosaics_that_do_not_fit(tmp_path):
    headers = [mosaic(0, Rows=11, Columns=15), mosaic(1), mosaic(2)]
    headers[0].PixelData = np.zeros((11, 15), "<u2").tobytes()
    block = headers[1].private_block(0x29, "SIEMENS CSA HEADER")
    del block[0x10]
    block = headers[2].private_block(0x29, "SIEMENS CSA HEADER")
    block[0x10].value = csa(NumberOfImagesInMosaic=["5"], SliceNormalVector=["0", "1", "0"])
    assert look(save(tmp_path, headers)).refused == {"no-geometry": 3}


@pytest.mark.parametrize("distance", [4, -4])
def test_reconstructed_nuclear_medicine(tmp_path, distance):
    """The sign of the distance says whether slices lie behind the first or before it."""
    stored = np.stack([pixels(z) for z in range(4)]).astype("<u2")
    detector = item(ImagePositionPatient=[-10, -20, 5], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    header = image("20", "NM", stored, ImageType=["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"], NumberOfFrames=4,
                   SpacingBetweenSlices=distance, PixelSpacing=[3, 2], DetectorInformationSequence=detector,
                   SliceVector=[1, 2, 3, 4])
    series = look(save(tmp_path, [header])).only
    order = range(4) if distance > 0 else range(3, -1, -1)
    np.testing.assert_array_equal(series.voxels_TSHW, axial([[pixels(z) for z in order]]))
    np.testing.assert_allclose(np.array(series.info.affine)[:3, 3], [10, 20, 5 if distance > 0 else -7], atol=1e-12)


def test_frames_without_places(tmp_path):
    stored = np.stack([pixels(z) for z in range(4)]).astype("<u2")
    planar = image("20", "NM", stored, ImageType=["ORIGINAL", "PRIMARY", "WHOLE BODY"], NumberOfFrames=4)
    angiogram = image("12.1", "XA", stored, NumberOfFrames=4)
    several = image("4", "MR", stored, NumberOfFrames=4)
    assert look(save(tmp_path, [planar, angiogram, several])).refused == {"film": 2, "no-geometry": 1}
