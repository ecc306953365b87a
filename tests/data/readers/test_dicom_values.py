"""Values of stored numbers: rescale, look-up tables, inversion, padding, types, and the codings of pixels."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from tests.data.readers.dicom_files import (
    axial,
    change,
    compress,
    ct_slice,
    enhanced,
    frame,
    image,
    look,
    mr_slice,
    pixels,
    save,
)


def values(tmp_path, *headers: Dataset, **more):
    found = look(save(tmp_path, list(headers), **more))
    assert not found.refused, found.refusals
    return found.only


@pytest.mark.parametrize(("stored", "slope", "intercept", "dtype"), [
    ("<u2", 1, 0, "int16"),
    ("<u2", 1, -1024, "int16"),
    ("<i2", 3, 5, "int16"),
    ("<u2", 20, 0, "uint16"),
    ("<u2", 40, -60_000, "float32"),
    ("<u2", 100_000, 0, "float32"),
    ("<u2", 0.5, 0, "float32"),
    ("<u2", 0.684, 200, "float32"),
    ("<u4", 1, 0, "int16"),
])
def test_the_smallest_type_that_is_exact(tmp_path, stored, slope, intercept, dtype):
    headers = [
        mr_slice(z, RescaleSlope=slope, RescaleIntercept=intercept, PixelData=pixels(z).astype(stored).tobytes(),
                 BitsAllocated=8 * int(stored[2]), BitsStored=8 * int(stored[2]), HighBit=8 * int(stored[2]) - 1,
                 PixelRepresentation=int(stored[1] == "i"))
        for z in range(4)
    ]
    series = values(tmp_path, *headers)
    expected = axial([[slope * pixels(z) + intercept for z in range(4)]])
    np.testing.assert_array_equal(series.voxels_TSHW, expected.astype(dtype))
    assert series.info.dtype == series.voxels_TSHW.dtype.name == dtype
    assert series.info.percentiles["50.0"] == np.percentile(series.voxels_TSHW, 50, method="inverted_cdf")


def test_small_values_take_a_byte(tmp_path):
    series = values(tmp_path, *(mr_slice(z, PixelData=np.full((4, 5), z, "<u2").tobytes()) for z in range(3)))
    assert series.info.dtype == "uint8" and series.voxels_TSHW.max() == 2


def test_slopes_of_pet_slice_by_slice(tmp_path):
    slopes = [0.5, 1.25, 3.0]
    headers = [
        mr_slice(z, SOPClassUID="1.2.840.10008.5.1.4.1.1.128", Modality="PT", Units="BQML", RescaleSlope=slopes[z],
                 RescaleIntercept=0, FrameReferenceTime=1000 * z)
        for z in range(3)
    ]
    series = values(tmp_path, *headers)
    np.testing.assert_array_equal(series.voxels_TSHW, axial([[slopes[z] * pixels(z) for z in range(3)]]))
    assert series.info.units == "Bq/ml" and series.info.kind == "volume" and series.info.dtype == "float32"


def test_monochrome1_is_turned_round_after_rescale(tmp_path):
    stored = np.arange(48).reshape(6, 8).astype("<u2")
    header = image("1", "CR", stored, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11,
                   RescaleSlope=2, RescaleIntercept=100, WindowCenter=[1000, 50], WindowWidth=[500, 0])
    series = values(tmp_path, header)
    # From 100 to 2 x 4095 + 100; the window at 1000 goes to 8390 - 1000, and one without width is none.
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0], 8390 - (2 * stored + 100))
    assert series.info.inverted and series.info.windows == ((7390.0, 500.0),)


def test_quantities_are_not_turned_round(tmp_path):
    series = values(tmp_path, ct_slice(PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0], pixels(0) - 1024)
    assert not series.info.inverted


def modality_lut(first: int, table: list[int], bits: int = 16) -> Sequence:
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [len(table), first, bits], "US"
    lut.LUTData = table
    lut["LUTData"].VR = "US"
    return Sequence([lut])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_modality_lut(tmp_path, photometric):
    stored = np.array([[0, 9, 10], [11, 12, 40]], "<u2")
    table = [500, 400, 350, 10]
    header = image("1", "CR", stored, ModalityLUTSequence=modality_lut(10, table),
                   PhotometricInterpretation=photometric)
    found = values(tmp_path, header).voxels_TSHW[0, 0]
    expected = np.array([[500, 500, 500], [400, 350, 10]])
    np.testing.assert_array_equal(found, 510 - expected if photometric == "MONOCHROME1" else expected)


def test_padding_of_ct_becomes_air(tmp_path):
    stored = pixels(0).astype("<i2")
    stored[0], stored[1, 0] = -2000, 3
    header = ct_slice(0, PixelRepresentation=1, PixelPaddingValue=-2000, PixelData=stored.tobytes())
    header["PixelPaddingValue"].VR = "SS"
    series = values(tmp_path / "outside", header)
    expected = stored.astype(int) - 1024
    expected[0] = 3 - 1024
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0], expected)
    assert series.info.notes == ()
    header.PixelPaddingValue = 1010  # 1010 - 1024 is as good as water
    series = values(tmp_path / "within", header)
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0], stored.astype(int) - 1024)
    assert "padding value lies among real ones" in series.info.notes[0]


def test_range_of_padding(tmp_path):
    stored = pixels(0).astype("<u2")
    stored[0, :3] = 0, 5, 10
    header = ct_slice(0, RescaleIntercept=0, PixelPaddingValue=0, PixelPaddingRangeLimit=10, PixelData=stored.tobytes())
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        header[name].VR = "US"
    expected = stored.copy()
    expected[0, :3] = expected[0, 3]
    np.testing.assert_array_equal(values(tmp_path, header).voxels_TSHW[0, 0], expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("high", [11, 15])
def test_bits_beside_those_stored_do_not_count(tmp_path, signed, high):
    """Twelve bits at either end of a word whose other bits hold something else (an overlay, in old files)."""
    numbers = (pixels(0) - 1000) * 100 + (-2000 if signed else 0)
    other = np.uint16(0xF000 if high == 11 else 0x000F)
    stored = (((numbers & 0xFFF).astype(np.uint16) << (high - 11)) | other).astype("<u2")
    header = mr_slice(BitsStored=12, HighBit=high, PixelRepresentation=int(signed), PixelData=stored.tobytes())
    np.testing.assert_array_equal(values(tmp_path, header).voxels_TSHW[0, 0], numbers)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [
    RLELossless, JPEGLSLossless, JPEG2000Lossless, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
])
def test_codings(tmp_path, syntax, signed):
    """Numbers of 12 bits, as each coding has them; the real files have those that nothing here can write."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(-2048, 2048, (2, 45, 37)) if signed else rng.integers(0, 4096, (2, 45, 37))
    headers = []
    for z in range(2):
        stored = numbers[z].astype("<i2" if signed else "<u2")
        header = change(mr_slice(z), Rows=45, Columns=37, BitsStored=12, HighBit=11, PixelRepresentation=int(signed),
                        PixelData=stored.tobytes())
        if syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
            compress(header, syntax)
        elif syntax == ExplicitVRBigEndian:
            header.PixelData = stored.astype(stored.dtype.newbyteorder(">")).tobytes()
        headers.append(header)
    np.testing.assert_array_equal(values(tmp_path, *headers, syntax=syntax).voxels_TSHW[0], numbers)


@pytest.mark.parametrize("table", [True, False])
def test_frames_in_several_fragments(tmp_path, table):
    """With and without a table of where frames begin; then the marker at the end of a picture tells."""
    numbers = np.random.default_rng(0).integers(0, 4096, (3, 50, 40)).astype("<u2")
    header = enhanced([frame(z) for z in range(3)], list(numbers), Rows=50, Columns=40)
    compress(header, JPEG2000Lossless)
    streams = list(generate_frames(header.PixelData, number_of_frames=3))
    header.PixelData = encapsulate(streams, fragments_per_frame=2, has_bot=table)
    series = values(tmp_path, header, syntax=JPEG2000Lossless)
    np.testing.assert_array_equal(series.voxels_TSHW[0], 2 * numbers.astype(int) - 7)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("planar", [0, 1])
def test_photographs_in_colour(tmp_path, photometric, planar):
    rgb = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (10, 120, 250)]], np.uint8)
    stored = rgb
    if photometric == "YBR_FULL":
        # Luma and chroma of ITU-R BT.601, as PS3.3, C.7.6.3.1.2 has them, rounded.
        matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
        stored = np.clip(np.rint(rgb @ matrix.T + [0, 128, 128]), 0, 255).astype(np.uint8)
    content = stored.transpose(2, 0, 1) if planar else stored
    header = image("77.1.4", "XC", np.zeros((2, 2), np.uint8), SamplesPerPixel=3, PlanarConfiguration=planar,
                   PhotometricInterpretation=photometric, PixelData=np.ascontiguousarray(content).tobytes())
    series = values(tmp_path, header)
    # Rounding luma and chroma moves a colour by up to 2.
    assert np.abs(series.voxels_TSHW[0, 0].astype(int) - rgb).max() <= (2 if photometric == "YBR_FULL" else 0)
    assert series.info.shape == (1, 1, 2, 2, 3) and series.info.dtype == "uint8" and series.info.percentiles == {}
