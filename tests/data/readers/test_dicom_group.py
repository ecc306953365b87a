"""Series split into stacks and runs, sorted, and what is said of the unusual ones."""

import numpy as np
import pytest

from megamed.data.readers import Refusal
from tests.data.readers.dicom_files import (
    PSEUDONYMS,
    READER,
    axial,
    change,
    ct_slice,
    image,
    look,
    mr_slice,
    pixels,
    run,
    save,
    scan,
)

STACK = axial([[pixels(z) for z in range(6)]])


def stack(num_slices: int = 6, make=mr_slice, **changes) -> list:
    return [make(z, **changes) for z in range(num_slices)]


def test_a_plain_stack(tmp_path):
    found = look(save(tmp_path, stack()))
    info = found.only.info
    np.testing.assert_array_equal(found.only.voxels_TSHW, STACK)
    assert (info.kind, info.plane, info.spacing_mm, info.notes) == ("volume", "axial", (2.0, 3.0, 4.0), ())
    # LPS (-10, -20, 5) is RAS (10, 20, 5); W runs to the left, H to the back.
    expected = [[-2, 0, 0, 10], [0, -3, 0, 20], [0, 0, 4, 5], [0, 0, 0, 1]]
    np.testing.assert_allclose(info.affine, expected, atol=1e-12)
    assert info.part == "" and list(found.series) == ["axial 5x4 2x3 mm TE 30 ms M ND"]


# In each: what of the slices of a second stack is different, and what the two are called.
SPLITS = {
    "echo": ({"EchoTime": 60}, ("TE 30 ms", "TE 60 ms")),
    "kind": ({"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}, ("M ND", "P ND")),
    "orientation": ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, ("axial", "sagittal")),
    "spacing": ({"PixelSpacing": [3, 2.5]}, ("2x3 mm", "2.5x3 mm")),
}


@pytest.mark.parametrize("split", SPLITS)
def test_two_stacks_in_one_series(tmp_path, split):
    changes, names = SPLITS[split]
    other = stack(**changes)
    if split == "orientation":
        for z, header in enumerate(other):
            header.ImagePositionPatient = [5 + 4 * z, -20, -10]
    found = look(save(tmp_path / "both", [*stack(), *other]))
    assert len(found.series) == 2 and not found.refused
    assert sorted(series.info.part for series in found.series.values()) == sorted(names)
    assert all(series.info.shape[1] == 6 and not series.info.notes for series in found.series.values())
    # Each part is called the same where the other is not there.
    alone = {*look(save(tmp_path / "one", stack())).series, *look(save(tmp_path / "two", other)).series}
    assert alone == set(found.series)


def test_matrix_splits(tmp_path):
    wide = np.arange(30, dtype="<u2").reshape(5, 6)
    other = [change(mr_slice(z), Rows=5, Columns=6, PixelData=wide.tobytes()) for z in range(3)]
    found = look(save(tmp_path, [*stack(), *other]))
    assert {series.info.part for series in found.series.values()} == {"5x4", "6x5"}


def private(header, group: int, creator: str, element: int, vr: str, value):
    header.private_block(group, creator, create=True).add_new(element, vr, value)


@pytest.mark.parametrize("vendor", ["standard", "siemens", "ge", "philips"])
def test_b_values_split(tmp_path, vendor):
    """b 0 and two directions of b 1000: a volume, and a run of two."""
    headers = []
    for t, b in enumerate((0, 1000, 1000)):
        for z in range(3):
            header = mr_slice(z, t, AcquisitionNumber=t + 1)
            if vendor == "standard":
                header.DiffusionBValue = b
            elif vendor == "siemens":
                private(header, 0x19, "SIEMENS MR HEADER", 0x0C, "IS", b)
            elif vendor == "ge":
                private(header, 0x43, "GEMS_PARM_01", 0x39, "IS", [1_000_000_000 + b if b else 0, 8, 0, 0])
            else:
                private(header, 0x2001, "Philips Imaging DD 001", 0x03, "FL", b)
            headers.append(header)
    found = look(save(tmp_path, headers))
    low, high = sorted(found.series.values(), key=lambda series: len(series.info.b_values))
    assert high.info.b_values == (1000.0, 1000.0) and high.info.shape[0] == 2 and high.info.part == "b 1000"
    assert low.info.shape[0] == 1 and low.info.b_values == ((0.0,) if vendor in ("standard", "siemens") else ())
    np.testing.assert_array_equal(high.voxels_TSHW, axial([[pixels(z, t) for z in range(3)] for t in (1, 2)]))


def test_acquisitions_that_are_stacks(tmp_path):
    """Of CT: two phases at the same places; two that interleave; but not slices that each have their own number."""
    phases = [ct_slice(z, AcquisitionNumber=a) for a in (2, 5) for z in range(6)]
    found = look(save(tmp_path / "phases", phases))
    assert {series.info.part for series in found.series.values()} == {"acquisition 2", "acquisition 5"}
    between = [change(ct_slice(z, AcquisitionNumber=2), ImagePositionPatient=[-10, -20, 6.3 + 4 * z]) for z in range(6)]
    found = look(save(tmp_path / "between", [*stack(make=ct_slice, AcquisitionNumber=1), *between]))
    assert [series.info.shape[1] for series in found.series.values()] == [6, 6]
    assert all(series.info.slice_positions_mm is None for series in found.series.values())
    single = [ct_slice(z, AcquisitionNumber=z // 2 + 1) for z in range(6)]
    found = look(save(tmp_path / "single", single))
    assert found.only.info.shape == (1, 6, 4, 5) and found.only.info.part == ""


def test_acquisitions_that_are_volumes(tmp_path):
    perfusion = [change(ct_slice(z, AcquisitionNumber=t + 1, AcquisitionTime=f"1015{2 * t:02d}"),
                        PixelData=pixels(z, t).astype("<u2").tobytes()) for t in range(4) for z in range(3)]
    found = look(save(tmp_path, perfusion))
    assert found.only.info.kind == "run" and found.only.info.repetition_time_s == 2.0
    np.testing.assert_array_equal(
        found.only.voxels_TSHW, axial([[pixels(z, t) - 1024 for z in range(3)] for t in range(4)])
    )


TIMES = {
    "temporal": lambda z, t: {"TemporalPositionIdentifier": t + 1},
    "acquisition": lambda z, t: {"AcquisitionNumber": t + 1},
    "time": lambda z, t: {"AcquisitionTime": f"1015{t:02d}.5"},
    "past-midnight": lambda z, t: {"AcquisitionTime": ("235958", "235959", "000000", "000001")[t]},
    "trigger": lambda z, t: {"TriggerTime": 1500 * t},
    "by-volume": lambda z, t: {"InstanceNumber": 3 * t + z},
    "by-slice": lambda z, t: {"InstanceNumber": 4 * z + t},
}


@pytest.mark.parametrize("how", TIMES)
def test_volumes_in_time(tmp_path, how):
    found = look(save(tmp_path, run(how=TIMES[how])))
    info = found.only.info
    np.testing.assert_array_equal(found.only.voxels_TSHW, axial([[pixels(z, t) for z in range(3)] for t in range(4)]))
    assert info.kind == "run" and info.repetition_time_s == 1.5 and info.notes == ()


@pytest.mark.parametrize(("changes", "seconds", "note"), [
    ({"RepetitionTime": 2.5}, 2.5, "read as seconds"),
    ({"RepetitionTime": None}, None, "not known"),
    ({"RepetitionTime": 4.5, "MRAcquisitionType": "3D"}, None, "not known"),
    ({"RepetitionTime": 4.5, "MRAcquisitionType": "3D", "clock": True}, 20.0, None),
])
def test_repetition_time(tmp_path, changes, seconds, note):
    clock = changes.pop("clock", False)

    def how(z: int, t: int) -> dict:
        return {"TemporalPositionIdentifier": t + 1, **changes, **({"ContentTime": f"10{t // 3:02d}{20 * t % 60:02d}"}
                                                                   if clock else {})}

    info = look(save(tmp_path, run(how=how))).only.info
    assert info.repetition_time_s == seconds
    assert len(info.notes) == (note is not None) and all(note in text for text in info.notes)


@pytest.mark.parametrize("how", ["temporal", "acquisition", "by-volume"])
def test_an_unfinished_last_volume_is_left_out(tmp_path, how):
    headers = run(how=TIMES[how])[:-1]
    found = look(save(tmp_path, headers))
    assert found.only.info.shape[0] == 3 and found.refused == {"incomplete-volume": 2}
    assert found.only.info.notes == ("2 slices of 1 unfinished volume at the end are left out",)
    np.testing.assert_array_equal(found.only.voxels_TSHW, axial([[pixels(z, t) for z in range(3)] for t in range(3)]))


@pytest.mark.parametrize("how", [*list(TIMES)[:4], "by-volume", "by-slice"])
def test_a_hole_in_a_run_is_refused(tmp_path, how):
    headers = run(how=TIMES[how])
    del headers[2 * 3 + 1]
    found = look(save(tmp_path, headers))
    assert found.series == {} and set(found.refused) == {"incomplete-run"}
    assert how.startswith("by") or "volume 3 has 2 of 3 slices" in str(found.refusals[0])


def test_a_slice_missing_in_each_volume(tmp_path):
    headers = run()
    kept = [header for i, header in enumerate(headers) if i not in (0, 4, 8)]
    assert set(look(save(tmp_path, kept)).refused) == {"incomplete-run"}


def test_no_sign_of_order(tmp_path):
    assert set(look(save(tmp_path, run(how=lambda z, t: {}))).refused) == {"unclear-order"}


def test_the_same_object_twice(tmp_path):
    headers = stack()
    save(tmp_path / "a", headers)
    save(tmp_path / "b", headers[:2])
    found = look(tmp_path)
    np.testing.assert_array_equal(found.only.voxels_TSHW, STACK)
    assert found.refused["duplicate"] == 2


def test_slices_taken_again(tmp_path):
    again = [mr_slice(z, 1, InstanceNumber=10 + z) for z in (1, 4)]
    headers = [mr_slice(z, InstanceNumber=z) for z in range(6)]
    found = look(save(tmp_path, [*headers, *again]))
    np.testing.assert_array_equal(found.only.voxels_TSHW, STACK)
    assert found.only.info.notes == ("2 slices were taken more than once; the first of each is used",)


def test_missing_and_irregular_slices(tmp_path):
    headers = stack()
    found = look(save(tmp_path / "missing", [headers[z] for z in (0, 1, 4, 5)]))
    info = found.only.info
    assert info.notes == ("2 slices are missing",) and info.slice_positions_mm == (0, 4, 16, 20)
    assert info.spacing_mm[2] == 4 and info.affine[2][2] == pytest.approx(20 / 3)
    np.testing.assert_array_equal(found.only.voxels_TSHW, STACK[:, [0, 1, 4, 5]])
    for header, z in zip(headers, (0, 4, 8, 11, 14, 17), strict=True):
        header.ImagePositionPatient = [-10, -20, z]
    info = look(save(tmp_path / "irregular", headers)).only.info
    assert info.notes == ("slices lie 3.00 to 4.00 mm apart",) and info.slice_positions_mm == (0, 4, 8, 11, 14, 17)


def test_shifted_slices_are_no_stack(tmp_path):
    headers = stack()
    headers[2].ImagePositionPatient = [-8.5, -20, 13]
    assert set(look(save(tmp_path, headers)).refused) == {"not-a-stack"}


@pytest.mark.parametrize(("row", "column", "plane"), [
    ([1, 0, 0], [0, 1, 0], "axial"),
    ([-1, 0, 0], [0, -1, 0], "axial"),
    ([0, 1, 0], [0, 0, -1], "sagittal"),
    ([1, 0, 0], [0, 0, -1], "coronal"),
    ([0, 0, -1], [-1, 0, 0], "coronal"),
    ([0.8, 0.6, 0], [0, 0, -1], "coronal"),
    ([0.936, 0.352, 0], [-0.288, 0.766, 0.575], "axial"),
])
@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_orientations(tmp_path, row, column, plane, tilt):
    """Every voxel lies where its header puts it, whichever way the stack lies or is slanted."""
    row, column = np.array(row, float), np.array(column, float)
    row = row / np.linalg.norm(row)
    column = column - row * (row @ column)
    column = column / np.linalg.norm(column)
    step = 4 * (np.cross(row, column) + tilt * column)
    headers = [mr_slice(z) for z in range(3)]
    for z, header in enumerate(headers):
        header.ImageOrientationPatient = [*np.round(row, 9), *np.round(column, 9)]
        header.ImagePositionPatient = list(np.round(np.array([-10, -20, 5]) + step * z, 6))
    series = look(save(tmp_path, headers)).only
    info = series.info
    to_ras, affine = np.diag([-1.0, -1.0, 1.0]), np.array(info.affine)
    for z in range(3):
        for r in range(4):
            for c in range(5):
                place = to_ras @ (np.array([-10, -20, 5]) + step * z + row * 2 * c + column * 3 * r)
                voxel = np.linalg.solve(affine[:3, :3], place - affine[:3, 3])
                w, h, s = np.rint(voxel).astype(int)
                np.testing.assert_allclose(voxel, [w, h, s], atol=1e-5)  # positions are written to 1e-6 mm
                assert series.voxels_TSHW[0, s, h, w] == pixels(z)[r, c]
    assert info.plane == plane and info.spacing_mm[2] == pytest.approx(4, abs=1e-4)
    assert info.gantry_tilt_deg == pytest.approx(np.degrees(np.arctan(tilt)), abs=0.01)
    direction = {"axial": (2, 1), "coronal": (1, -1), "sagittal": (0, -1)}[plane]
    assert affine[direction[0], 2] * direction[1] > 0


def test_localizers(tmp_path):
    coronal = [1, 0, 0, 0, 0, -1]
    scout = [ct_slice(z, ImageOrientationPatient=coronal, ImagePositionPatient=[0, 5 * z, 0]) for z in (0, 1)]
    marked = [ct_slice(9, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])]
    found = look(save(tmp_path, [*stack(make=ct_slice), *scout, *marked]))
    assert found.refused == {"localizer": 3} and found.only.info.plane == "axial"


def test_the_result_does_not_hang_on_the_order_of_files(tmp_path):
    headers, _ = scan(save(tmp_path, [*run(), *stack(EchoTime=60, SeriesInstanceUID="1.2.826.77.3")]))
    rng = np.random.default_rng(0)
    groupings = [READER.group([headers[i] for i in rng.permutation(len(headers))]) for _ in range(3)]
    assert groupings[0] == groupings[1] == groupings[2] and len(groupings[0].plans) == 2


def test_a_file_that_changed_after_the_scan(tmp_path):
    folder = save(tmp_path, stack())
    headers, _ = scan(folder)
    (plan,) = READER.group(headers).plans
    path = plan.headers[2].path
    content = bytearray(path.read_bytes())
    for damage, code in ((b"", "changed"), (b"more", "changed")):
        path.write_bytes(bytes(content) + damage if damage else bytes(content).replace(b"Doe^Jane", b"Doe^John"))
        with pytest.raises(Refusal) as caught:
            READER.read(plan)
        assert caught.value.code == code and caught.value.file == path
    path.unlink()
    with pytest.raises(Refusal) as caught:
        READER.read(plan)
    assert caught.value.code == "unreadable"


def test_pictures_are_series_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 4096, (6, 8)).astype("<u2")
    views = [
        image("1.1", "DX", stored, ViewPosition=view, ImagerPixelSpacing=[0.2, 0.1], ImageLaterality="L",
              BodyPartExamined="CHEST")
        for view in ("PA", "LL")
    ]
    found = look(save(tmp_path / "both", views))
    assert {series.info.view_position for series in found.series.values()} == {"PA", "LL"}
    for series in found.series.values():
        assert (series.info.kind, series.info.plane, series.info.shape) == ("image", "none", (1, 1, 6, 8))
        assert (series.info.spacing_mm, series.info.laterality) == ((0.1, 0.2, 0.0), "L")
        assert series.info.body_part == "CHEST" and series.info.affine == tuple(map(tuple, np.eye(4).tolist()))
    assert set(look(save(tmp_path / "one", views[:1])).series) < set(found.series)


def test_identity_is_pseudonymous(tmp_path):
    header, *_ = scan(save(tmp_path, [ct_slice(PixelPaddingValue=0)]))[0]
    identity = header.identity
    assert identity.patient == PSEUDONYMS.of("patient", "PAT-4711")
    assert identity.study == PSEUDONYMS.of("study", "1.2.826.77.1")
    assert identity.series == PSEUDONYMS.of("series", "1.2.826.77.2")
    assert identity.accession == PSEUDONYMS.of("accession", "ACC0815")
    assert identity.study_date == PSEUDONYMS.date("PAT-4711", "20200102") != ""
