"""What cannot be used is refused, with a code of its own and a mend, and without a word about a person."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from megamed.data.readers import Refusal
from tests.data.readers.dicom_files import (
    PSEUDONYMS,
    READER,
    SECRETS,
    change,
    compress,
    ct_slice,
    image,
    look,
    mr_slice,
    save,
    scan,
)

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)
SECONDARY = ["DERIVED", "SECONDARY"]

# Class, tags, and the code of the refusal, None where the picture is used: the table of `burned_in`.
BURNED_IN = [
    ("7", {}, "secondary-capture"),
    ("7", {"BurnedInAnnotation": "YES"}, "burned-in-annotation"),
    ("7", {"BurnedInAnnotation": "NO"}, None),
    ("6.1", {}, "ultrasound"),
    ("6.1", {"BurnedInAnnotation": "NO"}, None),
    ("1", {}, None),
    ("1", {"ImageType": ["DERIVED", "PRIMARY"]}, None),
    ("1", {"ImageType": SECONDARY}, "burned-in-unknown"),
    ("1.1", {"ImageType": SECONDARY, "BurnedInAnnotation": "NO"}, None),
    ("1.2", {"BurnedInAnnotation": "YES"}, "burned-in-annotation"),
    ("12.1", {}, None),
    ("77.1.4", {}, None),
    ("77.1.4", {"RecognizableVisualFeatures": "YES"}, "recognizable"),
    ("77.1.1", {}, "burned-in-unknown"),
    ("77.1.1", {"BurnedInAnnotation": "NO"}, None),
]


@pytest.mark.parametrize(("sop_class", "changes", "code"), BURNED_IN)
def test_pixels_that_may_name_somebody(tmp_path, sop_class, changes, code):
    found = look(save(tmp_path, [image(sop_class, "OT", GREY, **changes)]))
    assert found.refused == ({code: 1} if code else {}) and len(found.series) == (code is None)


@pytest.mark.parametrize(("header", "code"), [
    (ct_slice(BurnedInAnnotation="YES"), "burned-in-annotation"),
    (ct_slice(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), "secondary-capture"),
    (ct_slice(ImageType=["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]), "secondary-capture"),
    (ct_slice(ImagePositionPatient=None), "no-geometry"),
    (ct_slice(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "no-geometry"),
    (ct_slice(PixelSpacing=[0, 1]), "no-geometry"),
    (ct_slice(ImagePositionPatient=[1e30, 0, 0]), "no-geometry"),
    (ct_slice(RescaleSlope="1e300"), "not-finite"),
    (ct_slice(PhotometricInterpretation="PALETTE COLOR"), "secondary-capture"),
    (ct_slice(PhotometricInterpretation="YBR_RCT"), "unsupported-pixels"),
    (ct_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.22"), "not-an-image"),
    (ct_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1"), "not-an-image"),
    (ct_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.11.1"), "not-an-image"),
    (ct_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2"), "not-an-image"),
    (ct_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"), "not-an-image"),
    (ct_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.13.1.3"), "unsupported-class"),
    (ct_slice(PixelData=None), "no-pixels"),
    (ct_slice(Rows=3), None),
    (ct_slice(Rows=2), "size-mismatch"),
    (ct_slice(Rows=5), "truncated"),
    (ct_slice(Rows=60_000, Columns=60_000), "truncated"),
    (ct_slice(BitsAllocated=12), "unsupported-pixels"),
    (ct_slice(BitsStored=17), "unsupported-pixels"),
    (ct_slice(PhotometricInterpretation="HSV"), "unsupported-pixels"),
    (change(ct_slice(), SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8,
            BitsStored=8, HighBit=7, PixelData=bytes(60)), "secondary-capture"),
])
def test_what_is_no_slice(tmp_path, header, code):
    found = look(save(tmp_path, [header]))
    assert found.refused == ({code: 1} if code else {}), found.refusals
    for refusal in found.refusals:
        assert refusal.mend and refusal.reason and "\n" not in str(refusal)


@pytest.mark.parametrize("end", ["100", "101", "102", "103", "94", "95"])
def test_films_and_streams_are_not_read(tmp_path, end):
    """MPEG, HEVC, JPIP."""
    header = ct_slice(PixelData=encapsulate([b"\0" * 64]))
    header["PixelData"].VR, header["PixelData"].is_undefined_length = "OB", True
    found = look(save(tmp_path, [header], syntax=f"1.2.840.10008.1.2.4.{end}"))
    assert found.refused == {"unsupported-transfer-syntax": 1} and "transfer syntax" in found.refusals[0].mend


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_damaged_streams(tmp_path, syntax, capfd):
    """Cut short, with another size than the header says, or full of nonsense: refused without a word on the console."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 4096, (64, 48)).astype("<u2")

    def header(change_stream):
        one = change(mr_slice(), Rows=64, Columns=48, PixelData=numbers.tobytes())
        compress(one, syntax)
        one.PixelData = encapsulate([change_stream(next(generate_frames(one.PixelData, number_of_frames=1)))])
        return one

    cut = look(save(tmp_path / "cut", [header(lambda stream: stream[: len(stream) // 2])], syntax=syntax))
    assert set(cut.refused) == {"undecodable" if syntax == RLELossless else "truncated"}
    noise = rng.integers(0, 200, 2000).astype(np.uint8).tobytes()
    bad = look(save(tmp_path / "bad", [header(lambda s: s[:120] + noise + s[-2000:])], syntax=syntax))
    # A coding without a check sum may take noise for numbers; then it is of the right size.
    assert bad.refused in ({"undecodable": 1}, {})
    lying = header(lambda stream: stream)
    lying.Rows = 60_000
    lie = look(save(tmp_path / "lie", [lying], syntax=syntax))
    assert set(lie.refused) == {"undecodable" if syntax == RLELossless else "size-mismatch"}
    assert capfd.readouterr() == ("", "")


def test_a_file_that_ends_within_its_fragments(tmp_path):
    header = change(mr_slice(), Rows=64, Columns=48, PixelData=bytes(2 * 64 * 48))
    compress(header, JPEGLSLossless)
    folder = save(tmp_path, [header], syntax=JPEGLSLossless)
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    assert set(look(folder).refused) == {"truncated"}


def test_native_pixels_in_a_file_that_says_compressed(tmp_path):
    folder = save(tmp_path, [ct_slice()])
    path = next(folder.iterdir())
    content = path.read_bytes().replace(ExplicitVRLittleEndian.encode() + b"\0", JPEGBaseline8Bit.encode()[:19] + b"\0")
    assert len(content) == path.stat().st_size
    path.write_bytes(content)
    assert set(look(folder).refused) <= {"unsupported-transfer-syntax", "unreadable"} and not look(folder).series


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_files_cut_short(tmp_path, keep):
    folder = save(tmp_path, [mr_slice()])
    path = next(folder.iterdir())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    found = look(folder)
    assert not found.series and set(found.refused) <= {"truncated", "no-pixels", "unreadable", "not-dicom"}


@pytest.mark.parametrize(("name", "start", "stop", "code"), [
    # Headers, one of them with sequences, in which pydicom fails in ways of its own; then a stream in whose damage the
    # decoder panics, which is no Exception.
    ("693_J2KI.dcm", 132, 2400, "unreadable"),
    ("MR_small_bigendian.dcm", 132, 1400, "no-geometry"),
    ("MR_small_RLE.dcm", -6000, -1, "undecodable"),
])
def test_damage_is_a_refusal_or_harmless(tmp_path, name, start, stop, code, capfd):
    """A few bytes changed, again and again: nothing but a refusal is ever raised, and nothing is said."""
    content = Path(get_testdata_file(name, download=False)).read_bytes()
    rng = np.random.default_rng(0)
    codes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(120):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(start % len(content), stop % len(content), 3)] = rng.integers(0, 256, 3)
            (tmp_path / name).write_bytes(damaged.tobytes())
            found = look(tmp_path)
            codes |= set(found.refused)
            assert len(found.series) + sum(found.refused.values()) == 1
    assert code in codes and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("head", "expected"), [
    (b"\0" * 128 + b"DICM", True),
    (b"\x08\0\x05\0CS\x0a\0ISO_IR 100\x08\0\x08\0CS\x08\0ORIGINAL", True),
    (b"\x08\0\x05\0\x0a\0\0\0ISO_IR 100\x08\0\x08\0\x08\0\0\0ORIGINAL", True),
    (b"\0\x08\0\x05CS\0\x0aISO_IR 100\0\x08\0\x08CS\0\x08ORIGINAL", True),
    (b"\x08\0\x08\0CS\x0a\0ISO_IR 100\x08\0\x05\0CS\x08\0ORIGINAL", False),
    (b"\x5c\x01\0\0" + b"\0" * 344, False),
    (b"\x08\0" + b"\xff" * 300, False),
    (b"\x89PNG\r\n\x1a\n" + b"\0" * 300, False),
    (b"", False),
    (b"\0" * 1024, False),
])
def test_what_begins_as_dicom_does(head, expected, tmp_path):
    assert READER.can_read(tmp_path / "x", head.ljust(1024, b" ") if head else head) == expected


def test_a_file_without_preamble_or_meta_information(tmp_path):
    path = next(save(tmp_path, [mr_slice()]).iterdir())
    content = path.read_bytes()
    length = int.from_bytes(content[140:144], "little")
    path.write_bytes(content[144 + length :])
    assert len(look(tmp_path).series) == 1


def test_nothing_of_a_person_is_kept_or_said(tmp_path):
    free = {"SeriesDescription": "Dr^Who's series", "BodyPartExamined": "DOE JANE", "ViewPosition": "DOE",
            "Laterality": "DOE", "ImageType": ["ORIGINAL", "PRIMARY", "M", "DOE_JANE"], "RescaleType": "DOE"}
    headers = [mr_slice(z, **free) for z in range(3)]
    found = look(save(tmp_path / "good", headers))
    (plan,) = found.grouping.plans
    for header in plan.headers:
        text = json.dumps(header.facts)
        kept = json.dumps([found.only.info.to_json(), plan.part, plan.label, plan.notes])
        for secret in (*SECRETS, "101112", "Doe", "Who", "DOE"):
            assert secret not in text and secret not in kept
    bad = [ct_slice(ImagePositionPatient=None), image("7", "OT", GREY), ct_slice(SOPClassUID="1.2.826.77.5")]
    for refusal in look(save(tmp_path / "bad", bad)).refusals:
        assert not any(secret in str(refusal) for secret in SECRETS)


def test_a_refusal_names_the_file(tmp_path):
    headers, _ = scan(save(tmp_path, [mr_slice(z) for z in range(3)]))
    (plan,) = READER.group(headers).plans
    victim = plan.headers[1].path
    victim.unlink()
    with pytest.raises(Refusal) as caught:
        READER.read(plan)
    assert caught.value.file == victim and str(victim) not in str(caught.value)
    with pytest.raises(OSError):
        READER.metadata(victim, PSEUDONYMS)
