"""Every file of pydicom's tests: read as another decoder reads it, or refused with the right reason."""

import math
from collections import Counter

import numpy as np
import pytest

from tools.reader_tables import PYDICOM_FILES, DicomRow, dicom_rows

# Code of the refusal of each file that is refused; those of a folder by its name. The rest is read, or is not DICOM.
REFUSED = {
    "MR_truncated.dcm": "truncated",
    "rtplan_truncated.dcm": "truncated",
    "ExplVR_BigEnd.dcm": "ultrasound",
    "examples_jpeg2k.dcm": "ultrasound",
    "examples_palette.dcm": "ultrasound",
    "examples_rgb_color.dcm": "ultrasound",
    "examples_ybr_color.dcm": "ultrasound",
    "dicomdirtests/98892001/CT2N/6293": "localizer",
    "dicomdirtests/98892001/CT2N/6924": "localizer",
    # Made up to test nested sequences: Pixel Data, and nothing that says what of.
    "meta_missing_tsyntax.dcm": "unsupported-class",
    "nested_priv_SQ.dcm": "unsupported-class",
    **dict.fromkeys(
        (
            "GDCMJ2K_TextGBR.dcm", "JPEG-lossy.dcm", "JPEG2000-embedded-sequence-delimiter.dcm", "JPEG2000.dcm",
            "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm", "JPGExtended.dcm", "image_dfl.dcm",
            *(path.name for path in PYDICOM_FILES.glob("SC_*")),
        ),
        "secondary-capture",
    ),
    **dict.fromkeys(
        (
            "ExplVR_BigEndNoMeta.dcm", "ExplVR_LitEndNoMeta.dcm", "badVR.dcm",
            "empty_charset_LEI.dcm", "liver_1frame.dcm", "liver_expb_1frame.dcm",
            "no_meta_group_length.dcm", "reportsi.dcm",
            "reportsi_with_empty_number_tags.dcm", "rtdose.dcm", "rtdose_1frame.dcm", "rtdose_expb.dcm",
            "rtdose_expb_1frame.dcm", "rtdose_rle.dcm", "rtdose_rle_1frame.dcm", "rtplan.dcm", "rtstruct.dcm",
            "test-SR.dcm", "waveform_ecg.dcm",
            *(path.relative_to(PYDICOM_FILES).as_posix() for path in PYDICOM_FILES.rglob("DICOMDIR*")),
        ),
        "not-an-image",
    ),
    **dict.fromkeys(
        (
            "UN_sequence.dcm", "priv_SQ.dcm",
            *(path.relative_to(PYDICOM_FILES).as_posix() for path in PYDICOM_FILES.rglob("TINY_ALPHA/PT*/*/*/IM*")),
        ),
        "no-pixels",
    ),
}
# The same after BurnedInAnnotation was set to NO.
REFUSED_MARKED = {
    # The delimiter that is embedded overwrites the size within the stream.
    "JPEG2000-embedded-sequence-delimiter.dcm": "size-mismatch",
    "SC_rgb_rle_2frame.dcm": "film",
    "examples_ybr_color.dcm": "film",
    **dict.fromkeys(
        ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_rle_32bit_2frame.dcm"),
        "unsupported-pixels",
    ),
}
# `no_meta.dcm` begins within its first element.
NOT_DICOM = {
    "README.txt", "crayons.icc", "dicomdirtests/README.txt", "dicomdirtests/TINY_ALPHA/README", "no_meta.dcm",
    "rtplan.dump", "rtstruct.dump", "test1.json", "test_PN.json", "zipMR.gz",
}
# Nothing else that is installed decodes these; pydicom's own tests know single values.
NO_OTHER_DECODER = {"JPEG-lossy.dcm", "JPGExtended.dcm"}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, bool], DicomRow]:
    return {(row.file, row.marked): row for row in dicom_rows()}


def test_each_file_is_read_or_refused_for_the_right_reason(rows):
    assert len([key for key in rows if not key[1]]) == sum(path.is_file() for path in PYDICOM_FILES.rglob("*")) > 170
    for (file, marked), row in rows.items():
        code = row.refusal.code if row.refusal is not None else None
        assert code == (REFUSED_MARKED if marked else REFUSED).get(file), row
        assert (row.series is None and code is None) == (file in NOT_DICOM), row
    read = Counter(row.series.info.modality for row in rows.values() if row.series is not None and not row.marked)
    assert read == {"CT": 12, "MR": 26, "CR": 3}


def test_what_is_read_is_what_another_decoder_reads(rows):
    for row in rows.values():
        if row.series is None or row.file in NO_OTHER_DECODER:
            continue
        # Values in float32 are right to 2^-24 of 2179, the largest of the three radiographs; all else is exact.
        tolerance = 2e-4 if row.series.info.dtype == "float32" else 0
        assert row.difference <= tolerance, row


def test_values_that_others_have_published(rows):
    """Of pixels of JPEG with 12 bits, and of the colour bars of DCMTK's pictures, as pydicom's tests have them."""
    for file in NO_OTHER_DECODER:
        row = rows[file, True]
        assert math.isnan(row.difference)
        picture = row.series.voxels_TSHW[0, 0]
        assert (picture[420, 140], picture[230, 120], picture.max()) == (244, 95, 264)
    bars = [(255, 0, 0), (255, 128, 128), (0, 255, 0), (128, 255, 128), (0, 0, 255), (128, 128, 255), (0, 0, 0),
            (64, 64, 64), (192, 192, 192), (255, 255, 255)]
    lossless = {"SC_rgb_rle.dcm", "SC_rgb_jpeg_gdcm.dcm"}
    # Pictures of these bars; a lossy coding, or one by luma and chroma, misses a colour by up to 5 of 255.
    others = {f"SC_rgb_dcmtk_+eb+{how}.dcm" for how in ("cr", "cy+n1", "cy+n2", "cy+np", "cy+s2", "cy+s4")}
    others |= {"SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_lossy_gdcm.dcm", "SC_rgb_gdcm_KY.dcm",
               "SC_ybr_full_422_uncompressed.dcm"}
    for file in lossless | others:
        found = rows[file, True].series.voxels_TSHW[0, 0, 5::10, 50].astype(int)
        assert np.abs(found - bars).max() <= (0 if file in lossless else 5), (file, found)


def test_nothing_is_said_on_the_console(capfd):
    """By decoders or by pydicom, not even about a file that they all complain of."""
    row = next(row for row in dicom_rows() if row.file == "JPEG-lossy.dcm" and row.marked)
    assert row.series is not None
    assert capfd.readouterr() == ("", "")
