"""NIfTI: real files against nibabel and dcm2niix, every orientation, exact values, and a refusal for every bad file."""

import gzip
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import FileHeader, Refusal, SeriesPlan, nifti_file, paths
from megamed.data.readers.nifti import NiftiReader
from megamed.data.series import Series
from tools.reader_tables import DCM2NIIX_FILES, NIBABEL_FILES, nifti_rows

PSEUDONYMS = Pseudonyms(b"a key for tests only")
READER = NiftiReader()


def header_of(path: Path) -> FileHeader:
    assert READER.can_read(path, path.read_bytes()[:1024]), path.name
    return READER.metadata(path, PSEUDONYMS)


def plan_of(path: Path) -> SeriesPlan:
    grouping = READER.group([header_of(path)])
    assert grouping.refused == [] and grouping.plans[0].headers[0].path == path
    return grouping.plans[0]


def read(path: Path) -> Series:
    plan = plan_of(path)
    series = READER.read(plan)
    assert series.voxels_TSHW.size == plan.num_voxels
    assert (series.info.shape, series.info.dtype) == (series.voxels_TSHW.shape, series.voxels_TSHW.dtype.name)
    return series


def refusal(path: Path) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(path)
    # Nothing of the path, which may name somebody.
    assert path.name not in str(caught.value) and str(path.parent) not in str(caught.value) and caught.value.mend
    return caught.value


def write(path: Path, data: np.ndarray, affine=None, kind=nibabel.Nifti1Image, slope=None, **header) -> Path:
    image = kind(data, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    if slope is not None:
        raw = bytearray(path.read_bytes())
        raw[112:120] = np.array(slope, image.header.endianness + "f4").tobytes()  # scl_slope, scl_inter
        path.write_bytes(raw)
    return path


def voxels(*shape: int, dtype="int16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, shape).astype(dtype)


# Of nibabel's files that are not named here each is read, or is of another family (a script, DICOM).
REFUSED = {
    **dict.fromkeys(".PAR .REC .mnc .mgz .HEAD .BRIK .gz .trk .tck .v".split(), "unsupported-format"),
    "analyze.hdr": "unsupported-format", "row_major.dconn.nii": "unsupported-format",
    "nifti1.hdr": "missing-file", "nifti2.hdr": "missing-file",  # nibabel ships them without their .img
    "resampled_anat_moved.nii": "not-finite",
}
READ = {"anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "functional.nii", "reoriented_anat_moved.nii",
        "standard.nii.gz"}
FOREIGN = {".py", ".m", ".rst", ".dcm", ".gitignore"}


def test_every_file_of_nibabel_and_dcm2niix_is_read_right_or_refused_for_what_it_is():
    rows = {row.file: row for row in nifti_rows()}
    num_files = len([path for path in NIBABEL_FILES.iterdir() if path.is_file()])
    references = {f"{number}.nii" for number in range(1, 10)} if DCM2NIIX_FILES.is_dir() else set()
    assert len(rows) == num_files + len(references) > 70
    for name, row in rows.items():
        suffix = Path(name).suffix or name
        if name in READ | references:
            assert row.series is not None, (name, row.refusal)
            # float32 keeps 24 bits of what nibabel scales in float64.
            assert row.difference <= (2**-24 if row.series.info.dtype == "float32" else 0), name
            # Headers keep affines in float32, of values up to some hundred mm.
            assert row.corner_mm < 1e-4, name
        elif suffix in FOREIGN or name == "no_magic_number.tck":
            assert row.series is None and row.refusal is None, name
        else:
            assert row.refusal is not None and row.refusal.code == REFUSED.get(name, REFUSED.get(suffix)), name
    by_name = {name: row.series.info for name, row in rows.items() if row.series is not None}
    assert by_name["functional.nii"].repetition_time_s == 2.0 and by_name["functional.nii"].kind == "run"
    assert by_name["example4d.nii.gz"].notes == ("its repetition time, 2000 sec, was read as 2000 msec",)
    assert by_name["anatomical.nii"].modality == "OT"
    for name in references:
        info = by_name[name]
        assert (info.modality, info.echo_time_ms, info.field_strength_t, info.flip_angle_deg) == ("MR", 30.0, 3.0, 76.0)
        assert (info.dtype, info.spacing_mm, info.plane) == ("int16", (3.25, 3.25, 3.6), "axial")


DIRECTIONS = {  # in which W, H and S run, as axis of RAS and sign
    "axial": [(0, -1), (1, -1), (2, 1)],
    "coronal": [(0, -1), (2, -1), (1, -1)],
    "sagittal": [(1, -1), (2, -1), (0, -1)],
}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_no_voxel_leaves_its_place_whatever_way_the_axes_lie(tmp_path, order):
    """All 48 ways, with an oblique turn of 12 degrees and in time; slices along each axis in turn."""
    angle = math.radians(12)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    data = voxels(3, 4, 5, 2)
    for number, signs in enumerate(itertools.product([1, -1], repeat=3)):
        thick = number % 3
        affine = np.eye(4)
        sizes = np.where(np.arange(3) == thick, 4.0, [1.0, 1.5, 1.2])
        affine[:3, :3] = turn @ np.eye(3)[:, order] * signs * sizes
        affine[:3, 3] = [10, -20, 30]
        series = read(write(tmp_path / "a.nii", data, affine))
        info = series.info
        assert info.plane == ("sagittal", "coronal", "axial")[order[thick]] and info.spacing_mm[2] == 4.0
        found = np.array(info.affine)
        for column, (axis, sign) in enumerate(DIRECTIONS[info.plane]):
            assert np.argmax(np.abs(found[:3, column])) == axis and np.sign(found[axis, column]) == sign
        assert len(series.voxels_TSHW) == 2 and info.gantry_tilt_deg == 0
        back = np.linalg.inv(affine) @ found
        for s, h, w in np.ndindex(series.voxels_TSHW.shape[1:]):
            place = back @ [w, h, s, 1]
            nearest = np.round(place[:3]).astype(int)
            np.testing.assert_allclose(place[:3], nearest, atol=1e-5)  # the header keeps the affine in float32
            np.testing.assert_array_equal(series.voxels_TSHW[:, s, h, w], data[tuple(nearest)])


@pytest.mark.parametrize(("shape", "sizes", "dim_info", "plane"), [
    ((4, 5, 6), (1, 1, 1), None, "axial"),
    ((4, 5, 6), (1, 1.2, 1), None, "axial"),  # not clearly longer
    ((4, 5, 6), (1, 3, 1), None, "coronal"),
    ((4, 5, 6), (3, 1, 1), None, "sagittal"),
    ((4, 5, 6), (1, 3, 3), None, "axial"),
    ((4, 5, 6), (1, 3, 1), (0, 1, 2), "axial"),  # the header names it
    ((1, 5, 6), (1, 1, 1), None, "sagittal"),  # one slice
    ((4, 5), (1, 1, 1), None, "axial"),
])
def test_which_axis_the_slices_are_stacked_along(tmp_path, shape, sizes, dim_info, plane):
    image = nibabel.Nifti1Image(voxels(*shape), np.diag([*sizes, 1.0]))
    if dim_info:
        image.header.set_dim_info(*dim_info)
    nibabel.save(image, tmp_path / "a.nii")
    assert read(tmp_path / "a.nii").info.plane == plane


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(("stored", "slope", "inter", "dtype", "exact"), [
    (np.int16([-32768, 0, 32767]), None, None, "int16", True),
    (np.int16([-32768, 0, 32767]), 0, 5, "int16", True),  # a slope of zero: not scaled
    (np.int16([-32768, 0, 32767]), np.nan, 5, "int16", True),
    (np.dtype(">i2").type([1, 2, 300]), None, None, "int16", True),
    (np.uint16([0, 1, 65535]), 1, 0, "uint16", True),
    (np.uint16([0, 1, 4095]), 1, -1024, "int16", True),
    (np.uint8([0, 1, 255]), None, None, "uint8", True),
    (np.int8([-128, 0, 127]), None, None, "int16", True),
    (np.int16([0, 2, 4]), 0.5, 0, "uint8", True),
    (np.int16([0, 1, 3]), 0.5, 0, "float32", True),
    (np.int16([0, 1, 3]), 0.1, 0, "float32", False),
    (np.int32([-5, 0, 40000]), None, None, "float32", True),
    (np.int32([-5, 0, 30000]), None, None, "int16", True),
    (np.uint32([0, 7, 60000]), 1, 0, "uint16", True),
    (np.int64([0, 7, 2**24]), None, None, "float32", True),
    (np.float32([-1.5, 0, 3e38]), None, None, "float32", True),
    (np.float32([-1, 0, 300]), None, None, "int16", True),
    (np.float64([0.1, 0, 3]), None, None, "float32", False),
    (np.float64([0.1, 0, 3]), 10, 0, "uint8", True),
])
def test_values_are_exact_in_the_smallest_type(tmp_path, kind, stored, slope, inter, dtype, exact):
    data = np.broadcast_to(stored[:, None, None], (3, 2, 2))
    image = kind(np.ascontiguousarray(data), np.eye(4), dtype=stored.dtype)
    nibabel.save(image, tmp_path / "a.nii")
    if slope is not None:
        raw = bytearray((tmp_path / "a.nii").read_bytes())
        start, width = (112, "f4") if kind is nibabel.Nifti1Image else (176, "f8")
        raw[start : start + 2 * int(width[1])] = np.array([slope, inter], f"<{width}").tobytes()
        (tmp_path / "a.nii").write_bytes(raw)
    series = read(tmp_path / "a.nii")
    assert series.info.dtype == dtype and series.info.notes == ()
    scaled = stored.astype(np.float64) * (slope or 1) + (inter if slope else 0) if slope == slope else stored
    expected = scaled[::-1].astype(np.float32)  # W runs from right to left
    found = series.voxels_TSHW[0, 0, 0].astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert not exact or (expected.astype(np.float64) == scaled[::-1]).all()
    assert series.info.percentiles["50.0"] == np.sort(expected)[1]


def test_whole_numbers_that_float32_rounds_are_said(tmp_path):
    series = read(write(tmp_path / "a.nii", np.full((2, 2, 2), 2**24 + 1, np.int32)))
    assert series.info.dtype == "float32" and "whole numbers beyond 2^24 were rounded" in series.info.notes[0]


@pytest.mark.parametrize(("value", "unit", "beside", "seconds", "note"), [
    (2.0, "sec", None, 2.0, ""),
    (0.72, "sec", None, 0.72, ""),
    (2000.0, "msec", None, 2.0, ""),
    (2.0e6, "usec", None, 2.0, ""),
    (1.5, "unknown", None, 1.5, ""),
    (2000.0, "sec", None, 2.0, "its repetition time, 2000 sec, was read as 2000 msec"),
    (2.0, "msec", None, 2.0, "its repetition time, 2 msec, was read as 2 sec"),
    (1.0, "sec", 0.8, 0.8, ""),
    (0.0, "sec", 0.8, 0.8, ""),
    (2.0, "sec", 2000, 2.0, ""),  # no run has that; the header is believed
    (0.0, "sec", None, None, "it does not say how long a volume takes"),
    (2.0, "hz", None, None, "its volumes do not follow one another in time"),
])
def test_repetition_time(tmp_path, value, unit, beside, seconds, note):
    image = nibabel.Nifti1Image(voxels(4, 4, 4, 3), np.eye(4))
    image.header["pixdim"][4] = value
    image.header.set_xyzt_units("mm", unit)
    nibabel.save(image, tmp_path / "a.nii")
    if beside is not None:
        (tmp_path / "a.json").write_text(json.dumps({"RepetitionTime": beside}))
    info = read(tmp_path / "a.nii").info
    assert (info.kind, info.modality, info.repetition_time_s, "".join(info.notes)) == ("run", "MR", seconds, note)


def test_orientation_and_units_that_the_header_leaves_open_or_gets_wrong(tmp_path):
    image = nibabel.Nifti1Image(voxels(4, 5, 6), None)
    image.header["pixdim"][1:4] = 1, 2, 3
    image.header["cal_max"], image.header["cal_min"] = 80, 20
    nibabel.save(image, tmp_path / "a.nii")
    info = read(tmp_path / "a.nii").info
    assert info.spacing_mm == (1.0, 2.0, 3.0) and "left and right may be swapped" in info.notes[0]
    assert info.windows == ((50.0, 60.0),)
    # qform where sform is of no use; metres.
    image = nibabel.Nifti1Image(voxels(4, 5, 6), np.diag([0.001, 0.002, 0.003, 1]))
    image.set_qform(np.diag([-0.001, 0.002, 0.003, 1]), 1)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "b.nii")
    patched(tmp_path / "b.nii", 280, bytes(48))  # srow_x, srow_y, srow_z
    # It is said to be there, and is not.
    assert nibabel.load(tmp_path / "b.nii").header["sform_code"] > 0
    series = read(tmp_path / "b.nii")
    assert series.info.spacing_mm == (1.0, 2.0, 3.0)
    assert series.info.notes == ("the affine that sform gives does not span space",)
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0, ::-1], voxels(4, 5, 6)[:, :, 0].T)  # x runs to the left
    sheared = np.diag([1.0, 1, 3, 1])
    sheared[1, 2] = 3 * math.tan(math.radians(15))
    assert read(write(tmp_path / "c.nii", voxels(4, 5, 6), sheared)).info.gantry_tilt_deg == 15.0
    wrong = read(write(tmp_path / "d.nii", voxels(4, 5, 6), xyzt_units=7)).info
    assert wrong.spacing_mm == (2.0, 2.0, 2.0) and wrong.notes == ("its units are not valid; sizes were taken for mm",)


def test_of_what_lies_beside_it_only_codes_and_numbers_are_kept(tmp_path):
    folder = tmp_path / "sub-01" / "ses-2" / "dwi"
    folder.mkdir(parents=True)
    path = write(folder / "sub-01_ses-2_dwi.nii.gz", voxels(4, 5, 6, 3))
    (folder / "sub-01_ses-2_dwi.json").write_text(json.dumps({
        "PatientName": "MUELLER", "SeriesDescription": "DTI MUELLER", "BodyPartExamined": " brain", "Modality": "MR",
        "EchoTime": 0.0886, "FlipAngle": 90, "MagneticFieldStrength": 3, "RepetitionTime": 8.2, "Laterality": "MUELLER",
        "ContrastBolusAgent": "Gd MUELLER", "Units": "MUELLER",
    }))
    (folder / "sub-01_ses-2_dwi.bval").write_text("0 1000 1000\n")
    info = read(path).info
    assert "MUELLER" not in json.dumps(info.to_json())
    assert (info.body_part, info.echo_time_ms, info.field_strength_t, info.contrast, info.laterality, info.units) == (
        "BRAIN", 88.6, 3.0, True, "", "a.u.")
    assert info.keywords == ("brain", "diffusion")
    assert info.b_values == (0.0, 1000.0, 1000.0) and info.repetition_time_s == 8.2 and info.notes == ()
    (folder / "sub-01_ses-2_dwi.bval").write_text("0 1000\n")
    (folder / "sub-01_ses-2_dwi.json").write_text("{")
    info = read(path).info
    assert info.notes == ("the JSON file beside it cannot be read", "the b-values beside it do not fit it")
    assert info.modality == "MR" and info.b_values == ()
    # CT in Hounsfield units by its name or by the file beside it; nothing of MR sticks to it.
    assert read(write(tmp_path / "case7_ct.nii", voxels(4, 5, 6))).info.units == "HU"
    pet = write(tmp_path / "x.nii", voxels(4, 5, 6))
    (tmp_path / "x.json").write_text(json.dumps({"Modality": "PT", "Units": "Bq/mL", "EchoTime": 1}))
    assert (read(pet).info.modality, read(pet).info.units, read(pet).info.echo_time_ms) == ("PT", "Bq/ml", None)
    assert refusal(write(tmp_path / "case7_seg.nii", voxels(4, 5, 6))).code == "not-an-image"


def test_keywords_of_the_header_the_name_and_what_lies_beside_it(tmp_path):
    path = write(tmp_path / "hand_FLAIR.nii", voxels(4, 5, 6), descrip=b"V.a. Schlaganfall Mueller")
    assert read(path).info.keywords == ("flair", "stroke"), "of the name its last word: the others may be a person's"
    (tmp_path / "hand_FLAIR.json").write_text(
        '{"StudyDescription": "MRT Kopf Mueller", "ProtocolName": ["x"], "BodyPart": "Sella", "PatientName": "Knee"}')
    assert read(path).info.keywords == ("flair", "head", "pituitary", "stroke")
    assert read(write(tmp_path / "knee_hand.nii", voxels(4, 5, 6))).info.keywords == ()


def test_whose_it_is(tmp_path, monkeypatch):
    def identity(name: str, number: int = 0):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return header_of(write(path, voxels(4, 5, 6) + number)).identity

    with_session = identity("a/sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz")
    assert with_session.patient == PSEUDONYMS.of("patient", "sub-01")
    assert with_session.study == PSEUDONYMS.of("study", "sub-01_ses-2")
    assert identity("a/sub-01/ses-2/func/run.nii").study == with_session.study
    without = identity("b/sub-01/anat/sub-01_T1w.nii")
    assert (without.patient, without.study) == (with_session.patient, PSEUDONYMS.of("study", "sub-01"))
    one, other = identity("case1/ct.nii"), identity("case2/ct.nii", 1)
    assert one.patient != other.patient and one.study != other.study and one.series != other.series
    assert one.accession == other.accession == PSEUDONYMS.of("accession", "ct") and not with_session.accession
    assert "ct" not in one.patient + one.study + one.series and one.study_date == ""
    # Named by content, wherever it lies and from wherever it is looked at.
    moved = tmp_path / "else"
    moved.mkdir()
    (moved / "other.nii").write_bytes((tmp_path / "case1" / "ct.nii").read_bytes())
    monkeypatch.chdir(moved)
    assert header_of(Path("other.nii")).identity.series == one.series
    monkeypatch.chdir(tmp_path)
    assert header_of(Path("case1/ct.nii")).identity == one
    # The same one twice is one series.
    headers = [header_of(Path("else/other.nii")), header_of(Path("case1/ct.nii"))]
    grouping = READER.group(headers)
    assert [plan.headers[0].path for plan in grouping.plans] == [Path("case1/ct.nii")]
    [(refused, why)] = grouping.refused
    assert refused.path == Path("else/other.nii") and why.code == "duplicate"
    assert READER.group(headers[::-1]).plans == grouping.plans
    # Larger files by blocks of them.
    monkeypatch.setattr(paths, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(paths, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(paths, "_BLOCKS", 7)
    large = write(Path("large.nii"), voxels(20, 20, 20))
    before = header_of(large).identity.series
    assert header_of(large).identity.series == before != one.series
    with large.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert header_of(large).identity.series != before


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
@pytest.mark.parametrize("compressed", ["", "hdr", "img", "both"])
def test_a_pair_is_one_series(tmp_path, kind, compressed):
    header, data = tmp_path / "a.hdr", tmp_path / "a.img"
    nibabel.save(kind(voxels(4, 5, 6), np.eye(4)), data)
    if compressed in ("hdr", "both"):
        packed = header.with_name("a.hdr.gz")
        packed.write_bytes(gzip.compress(header.read_bytes()))
        header.unlink()
        header = packed
    if compressed in ("img", "both"):
        packed = data.with_name("a.img.gz")
        packed.write_bytes(gzip.compress(data.read_bytes()))
        data.unlink()
        data = packed
    headers = [header_of(data), header_of(header)]
    assert headers[0].identity == headers[1].identity
    grouping = READER.group(headers)
    assert grouping.refused == [] and [h.path for h in grouping.plans[0].headers] == [header, data]
    found = READER.read(grouping.plans[0]).voxels_TSHW[0]
    np.testing.assert_array_equal(found[:, ::-1, ::-1], voxels(4, 5, 6).transpose(2, 1, 0))
    alone = READER.group([headers[0]])
    assert alone.plans == [] and alone.refused[0][1].code == "missing-file"
    raw = data.read_bytes()
    data.write_bytes(raw[:-9])
    assert refusal(header).code == "truncated"
    data.unlink()
    assert refusal(header).code == "missing-file"
    data.write_bytes(raw)
    header.unlink()
    assert refusal(data).code == "missing-file" and "the .hdr of this .img is missing" in str(refusal(data))


def patched(path: Path, where: int, value: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[where : where + len(value)] = value
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(("code", "make"), [
    ("truncated", lambda whole, folder: cut(whole, -1)),
    ("truncated", lambda whole, folder: cut(whole, 300)),
    ("truncated", lambda whole, folder: cut(packed(whole), -30)),
    ("truncated", lambda whole, folder: cut(packed(whole), -1)),
    ("truncated", lambda whole, folder: cut(packed(whole), 15)),
    ("truncated", lambda whole, folder: patched(whole, 42, b"\xff\x7f\xff\x7f\x04\x00")),  # dim
    ("truncated", lambda whole, folder: packed(patched(whole, 42, b"\xff\x7f\xff\x7f\x04\x00"))),
    ("too-large", lambda whole, folder: packed(patched(whole, 42, b"\xff\x7f\xff\x7f\xff\x7f"))),
    ("damaged", lambda whole, folder: extended(whole)),
    ("damaged", lambda whole, folder: packed(extended(whole))),
    ("damaged", lambda whole, folder: extended(packed(whole))),
    ("damaged", lambda whole, folder: patched(packed(whole), 100, b"\xff\x00\xff\x00")),
    ("damaged", lambda whole, folder: patched(packed(whole), packed(whole).stat().st_size - 8, b"\0\0\0\0")),  # CRC
    ("bad-header", lambda whole, folder: patched(whole, 42, b"\0\0")),
    ("bad-header", lambda whole, folder: patched(whole, 42, b"\xff\xff")),
    ("bad-header", lambda whole, folder: patched(whole, 40, b"\x09\0")),
    ("bad-header", lambda whole, folder: patched(whole, 108, np.float32(10).tobytes())),  # vox_offset
    ("bad-header", lambda whole, folder: patched(whole, 108, np.float32(np.nan).tobytes())),
    ("bad-header", lambda whole, folder: patched(whole, 112, np.float32([2, np.inf]).tobytes())),  # scaling
    ("truncated", lambda whole, folder: patched(whole, 108, np.float32(1e30).tobytes())),
    ("truncated", lambda whole, folder: packed(patched(whole, 108, np.float32(1e9).tobytes()))),
    ("unsupported-voxels", lambda whole, folder: patched(whole, 70, b"\x01\0")),  # datatype
    ("unsupported-voxels", lambda whole, folder: patched(whole, 70, b"\x99\x09")),
    ("unsupported-voxels", lambda whole, folder: write(folder / "a.nii", voxels(4, 5, 6, dtype="complex64"))),
    ("unsupported-voxels", lambda whole, folder: write(
        folder / "a.nii", np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")]))),
    ("unsupported-dimensions", lambda whole, folder: write(folder / "a.nii", voxels(4, 5, 6, 1, 3))),
    ("not-an-image", lambda whole, folder: write(folder / "a.nii", voxels(4, 1, 1, 9))),
    ("not-an-image", lambda whole, folder: write(folder / "a.nii", voxels(4, 5, 6), intent_code=1002)),
    ("not-an-image", lambda whole, folder: write(folder / "a.nii", voxels(4, 5, 6, 3), intent_code=1006)),
    ("unsupported-format", lambda whole, folder: write(folder / "a.nii", voxels(4, 5, 6), intent_code=3006)),
    ("bad-affine", lambda whole, folder: patched(  # no form; pixdim
        patched(whole, 252, bytes(4)), 80, np.float32([0, 1, 1]).tobytes())),
    ("not-finite", lambda whole, folder: write(folder / "a.nii", np.full((4, 5, 6), np.nan, np.float32))),
    ("not-finite", lambda whole, folder: write(folder / "a.nii", np.full((4, 5, 6), 1e300))),
    ("not-finite", lambda whole, folder: write(folder / "a.nii", voxels(4, 5, 6), slope=(3e38, 0))),
    ("not-nifti", lambda whole, folder: text(folder / "a.nii")),
    ("not-nifti", lambda whole, folder: text(folder / "a.hdr")),
])
def test_a_bad_file_is_refused_for_what_is_wrong_with_it(tmp_path, code, make):
    whole = write(tmp_path / "whole.nii", voxels(4, 5, 6))
    assert refusal(make(whole, tmp_path)).code == code


def cut(path: Path, to: int) -> Path:
    path.write_bytes(path.read_bytes()[:to])
    return path


def packed(path: Path) -> Path:
    other = path.with_suffix(".nii.gz")
    other.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    return other


def extended(path: Path) -> Path:
    path.write_bytes(path.read_bytes() + b"junk")
    return path


def text(path: Path) -> Path:
    path.write_text("not an image\n" * 100)
    return path


def test_a_compressed_file_is_not_inflated_beyond_what_its_header_says(tmp_path, monkeypatch):
    whole = write(tmp_path / "a.nii", voxels(4, 5, 6))
    size = whole.stat().st_size
    bomb = tmp_path / "b.nii.gz"
    bomb.write_bytes(gzip.compress(whole.read_bytes() + bytes(50_000_000)))
    given = []

    class Counted(gzip.GzipFile):
        def read(self, size=-1):
            given.append(len(data := super().read(size)))
            return data

        def readinto(self, buffer):
            given.append(count := super().readinto(buffer))
            return count

    monkeypatch.setattr(nifti_file.gzip, "GzipFile", Counted)
    assert refusal(bomb).code == "damaged"
    # The header twice, and the file once; what one of the two methods hands to the other is counted twice.
    assert size < sum(given) <= 2 * (540 + size)


def test_a_file_that_changed_since_it_was_looked_at_is_refused(tmp_path):
    plan = plan_of(write(tmp_path / "a.nii", voxels(4, 5, 6)))
    write(tmp_path / "a.nii", voxels(4, 5, 7))
    with pytest.raises(Refusal) as caught:
        READER.read(plan)
    assert caught.value.code == "changed" and caught.value.file == tmp_path / "a.nii"


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_no_damage_does_more_than_refuse(tmp_path, name):
    """Random bytes in the header and anywhere, and cuts."""
    path = write(tmp_path / name, voxels(4, 5, 6, 2))
    whole = path.read_bytes()
    draw = np.random.default_rng(1)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(200):
        raw = bytearray(whole)
        for _ in range(int(draw.integers(1, 4))):
            end = min(352, len(raw)) if draw.random() < 0.8 else len(raw)
            raw[int(draw.integers(end))] = int(draw.integers(256))
        path.write_bytes(raw if draw.random() < 0.9 else raw[: int(draw.integers(len(raw)))])
        try:
            if READER.can_read(path, path.read_bytes()[:1024]):
                read(path)
                outcomes["read"] += 1
        except Refusal:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 30 and (outcomes["read"] > 30 or name.endswith("gz"))


def test_what_ingest_starts_in_its_workers_does_without_torch():
    modules = ("readers.nifti", "readers.image", "store.inspect")
    program = "import sys, " + ", ".join(f"megamed.data.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", f"{program}; assert 'torch' not in sys.modules"], check=True)
