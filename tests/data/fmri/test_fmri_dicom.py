"""DICOM runs: the real Philips run, small written ones for the other orders, and bad folders."""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from megamed.data import FmriRun, read_run
from megamed.utils import UserError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
REAL = SHARED / "fmri_dicom" / "dicoms"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
NUM_COLUMNS, NUM_ROWS, NUM_SLICES, NUM_VOLUMES = 5, 4, 3, 4


@pytest.fixture(scope="module")
def real_run() -> FmriRun:
    if not REAL.is_dir():
        pytest.skip(f"no real DICOM run at {REAL}")
    return read_run(REAL)


def test_real_run(real_run):
    assert real_run.signal_XYZT.shape == (80, 80, 35, 18) and real_run.signal_XYZT.dtype == np.float32
    assert real_run.voxel_size_mm == (3.0, 3.0, 3.3) and real_run.repetition_time_s == 2.0
    assert nibabel.aff2axcodes(real_run.affine) == ("R", "A", "S") and real_run.source == "dicoms"


def test_real_voxels_lie_where_their_headers_say(real_run):
    """Equation C.7.6.2.1-1 of DICOM PS3.3, pixel by pixel, for a few files in any order."""
    rng = np.random.default_rng(0)
    to_voxel = np.linalg.inv(real_run.affine)
    for path in sorted(REAL.iterdir())[::45]:
        header = pydicom.dcmread(path)
        first, second = np.split(np.array(header.ImageOrientationPatient, float), 2)
        for row, column in rng.integers(0, 80, (5, 2)):
            lps = np.array(header.ImagePositionPatient, float) + first * 3.0 * column + second * 3.0 * row
            voxel = (to_voxel @ [-lps[0], -lps[1], lps[2], 1])[:3]
            nearest = np.round(voxel).astype(int)
            np.testing.assert_allclose(voxel, nearest, atol=0.01)  # positions are written to 1e-5 mm
            time = int(header.TemporalPositionIdentifier) - 1
            assert real_run.signal_XYZT[(*nearest, time)] == header.pixel_array[row, column]


def make_slice(z: int, t: int, **changes) -> Dataset:
    """Slice z (0 at the feet) of volume t: pixels say where and when it was taken."""
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = MR_IMAGE, generate_uid()
    header.SeriesInstanceUID, header.Modality = "1.2.3", "MR"
    header.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    header.Rows, header.Columns, header.SamplesPerPixel = NUM_ROWS, NUM_COLUMNS, 1
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
    header.PhotometricInterpretation = "MONOCHROME2"
    header.PixelSpacing, header.SliceThickness = [3, 2], 4  # between rows, between columns
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.ImagePositionPatient = [-10, -20, 5 + 4 * z]
    header.RepetitionTime, header.EchoTime = 1500, 30
    header.InstanceNumber = t * NUM_SLICES + z + 1
    header.RescaleSlope, header.RescaleIntercept = 2, 1
    header.PixelData = pixels(z, t).astype("<u2").tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    return header


def pixels(z: int, t: int) -> np.ndarray:
    return 1000 + 500 * z + 50 * t + np.arange(NUM_ROWS * NUM_COLUMNS).reshape(NUM_ROWS, NUM_COLUMNS)


def save(folder: Path, headers: list[Dataset]) -> Path:
    """Write files without extension whose names say nothing of their order."""
    folder.mkdir(exist_ok=True)
    order = np.random.default_rng(1).permutation(len(headers))
    for name, index in zip(order + len(list(folder.iterdir())), range(len(headers)), strict=True):
        header = headers[index]
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.save_as(folder / f"IM{name:04d}", enforce_file_format=True)
    return folder


def make_run(change=lambda z, t: {}) -> list[Dataset]:
    return [make_slice(z, t, **change(z, t)) for t in range(NUM_VOLUMES) for z in range(NUM_SLICES)]


def check(run: FmriRun) -> None:
    """The run that `make_run` describes: rescaled, X to the right, Y to the front."""
    assert run.signal_XYZT.shape == (NUM_COLUMNS, NUM_ROWS, NUM_SLICES, NUM_VOLUMES)
    for z in range(NUM_SLICES):
        for t in range(NUM_VOLUMES):
            expected = (pixels(z, t) * 2 + 1).T[::-1, ::-1]  # LPS grid: both axes turn round
            np.testing.assert_array_equal(run.signal_XYZT[:, :, z, t], expected)
    assert run.voxel_size_mm == (2.0, 3.0, 4.0) and run.repetition_time_s == 1.5
    # The last column and row of the first slice are the new origin: x = -(-10 + 4 * 2), y = -(-20 + 3 * 3).
    np.testing.assert_allclose(run.affine[:3, 3], [2, 11, 5])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda z, t: {"TemporalPositionIdentifier": t + 1, "InstanceNumber": 1}, id="temporal"),
        pytest.param(lambda z, t: {"AcquisitionNumber": t + 1, "InstanceNumber": 1}, id="acquisition-number"),
        pytest.param(
            lambda z, t: {"AcquisitionNumber": 1, "AcquisitionTime": f"1015{t:02d}.5", "InstanceNumber": 1},
            id="acquisition-time",
        ),
        pytest.param(
            lambda z, t: {"AcquisitionDate": f"2020010{1 + t // 2}", "InstanceNumber": 1,
                          "AcquisitionTime": ("235958", "235959", "000000", "000001")[t]},
            id="past-midnight",
        ),
        # An acquisition time of its own for every slice says nothing about volumes.
        pytest.param(lambda z, t: {"AcquisitionTime": f"1015{10 * t + z:02d}"}, id="order-by-volume"),
        pytest.param(lambda z, t: {"InstanceNumber": z * NUM_VOLUMES + t + 1}, id="order-by-slice"),
    ],
)
def test_volumes_in_time(tmp_path, change):
    check(read_run(save(tmp_path / "run", make_run(change))))


def test_what_is_not_of_the_run_is_passed_over(tmp_path, caplog):
    """Other files, other series, and the same object twice."""
    folder = save(tmp_path / "run", make_run())
    scout = [make_slice(z, 0, SeriesInstanceUID="1.2.9", InstanceNumber=z) for z in range(NUM_SLICES)]
    save(folder, scout)
    save(folder, [make_slice(0, 0, SOPClassUID="1.2.840.10008.5.1.4.1.1.7", SeriesInstanceUID="1.2.8")])
    (folder / "notes.txt").write_text("not DICOM")
    (folder / "empty").write_bytes(b"")
    deeper = folder / "more"
    deeper.mkdir()
    first = next(path for path in folder.iterdir() if path.name.startswith("IM"))
    (deeper / "copy").write_bytes(first.read_bytes())
    check(read_run(folder))
    assert "1 files repeat a SOPInstanceUID" in caplog.text


def test_one_slice_and_other_stack_direction(tmp_path):
    single = [make_slice(0, t) for t in range(NUM_VOLUMES)]
    run = read_run(save(tmp_path / "single", single))
    assert run.signal_XYZT.shape == (NUM_COLUMNS, NUM_ROWS, 1, NUM_VOLUMES)
    assert run.voxel_size_mm == (2.0, 3.0, 4.0)  # from SliceThickness
    # Rows up instead of down: the normal points to the feet, and the same voxels are found.
    flipped = []
    for t in range(NUM_VOLUMES):
        for z in range(NUM_SLICES):
            flipped.append(
                make_slice(
                    z, t,
                    ImageOrientationPatient=[1, 0, 0, 0, -1, 0],
                    ImagePositionPatient=[-10, -20 + 3 * (NUM_ROWS - 1), 5 + 4 * z],
                    PixelData=pixels(z, t)[::-1].astype("<u2").tobytes(),
                )
            )
    check(read_run(save(tmp_path / "flipped", flipped)))


def error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_run(folder)
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text
    assert "1.2.3" not in text  # no identifier of the study
    return text


def test_bad_folders_are_one_line_with_the_mend(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is empty" in error(empty)
    (empty / "notes.txt").write_text("not DICOM")
    assert "no DICOM MR image (1 files, 0 of them DICOM)" in error(empty)

    assert "single volume" in error(save(tmp_path / "single", make_run()[:NUM_SLICES]))
    two = [*make_run(), *make_run(lambda z, t: {"SeriesInstanceUID": "1.2.4"})]
    assert "2 runs with more than one volume" in error(save(tmp_path / "two", two))

    mosaic = make_run(lambda z, t: {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]})
    said = error(save(tmp_path / "mosaic", mosaic))
    assert "a mosaic that does not say how many slices it has" in said and "dcm2niix" in said
    enhanced = [make_slice(0, 0, SOPClassUID=MR_IMAGE + ".1", NumberOfFrames=1)]
    assert "1 frames, but 0 of them described" in error(save(tmp_path / "enhanced", enhanced))

    missing_z = [header for header in make_run() if header.ImagePositionPatient[2] != 9]
    apart = [*missing_z, *(make_slice(3, t) for t in range(NUM_VOLUMES))]
    assert "4.00 to 8.00 mm apart" in error(save(tmp_path / "gap", apart))
    sizes = make_run(lambda z, t: {"PixelSpacing": [3, 2 + z]})
    assert "3 runs with more than one volume (2x3 mm; 3x3 mm; 4x3 mm)" in error(save(tmp_path / "sizes", sizes))
    echoes = make_run(lambda z, t: {"EchoTime": 30 + 10 * (t % 2)})
    assert "2 runs with more than one volume (TE 30 ms; TE 40 ms)" in error(save(tmp_path / "echoes", echoes))
    phase = make_run(lambda z, t: {"ImageType": ["ORIGINAL", "PRIMARY", "MP"[t % 2], "ND"]})
    assert "2 runs with more than one volume (M ND; P ND)" in error(save(tmp_path / "phase", phase))
    assert "no possible RepetitionTime" in error(
        save(tmp_path / "tr", make_run(lambda z, t: {"RepetitionTime": None}))
    )
    assert "a slice without position" in error(
        save(tmp_path / "position", make_run(lambda z, t: {"ImagePositionPatient": None}))
    )
    assert "say its order" in error(save(tmp_path / "order", make_run(lambda z, t: {"InstanceNumber": None})))


@pytest.mark.parametrize("tag", ["TemporalPositionIdentifier", "AcquisitionNumber", "InstanceNumber"])
def test_incomplete_volumes_are_counted(tmp_path, tag):
    headers = make_run(lambda z, t: {tag: t + 1})
    del headers[2 * NUM_SLICES + 1]
    said = error(save(tmp_path / "run", headers))
    assert "1 of 4 volumes are incomplete (volume 3 has 2 of 3 slices)" in said


def test_an_unfinished_last_volume_is_left_out(tmp_path, caplog):
    """A scan that was stopped, as far as one can tell."""
    headers = make_run(lambda z, t: {"TemporalPositionIdentifier": t + 1})
    run = read_run(save(tmp_path / "run", headers[:-1]))
    assert run.num_volumes == NUM_VOLUMES - 1
    assert "2 slices of 1 unfinished volume at the end are left out" in caplog.text


def test_a_slice_missing_at_every_place_shifts_nothing(tmp_path):
    """With a slice gone at each place, no place tells how many volumes there were; the identifiers do."""
    headers = make_run(lambda z, t: {"TemporalPositionIdentifier": t + 1})
    kept = [header for i, header in enumerate(headers) if i not in (0, NUM_SLICES + 1, 2 * NUM_SLICES + 2)]
    assert "3 of 4 volumes are incomplete" in error(save(tmp_path / "run", kept))


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.98])
def test_cut_file_is_named(tmp_path, keep):
    folder = save(tmp_path / "run", make_run(lambda z, t: {"TemporalPositionIdentifier": t + 1}))
    victim = sorted(folder.iterdir())[3]
    content = victim.read_bytes()
    victim.write_bytes(content[: int(len(content) * keep)])
    assert str(victim) in error(folder)


def test_compressed_pixels(tmp_path):
    """A real MR file in RLE, as a run of two volumes, reads as its uncompressed twin."""
    packed = pydicom.dcmread(str(get_testdata_file("MR_small_RLE.dcm")))
    plain = pydicom.dcmread(str(get_testdata_file("MR_small.dcm")))
    for t in range(2):
        packed.SOPInstanceUID, packed.TemporalPositionIdentifier = generate_uid(), t + 1
        packed.RepetitionTime = 2000
        packed.save_as(tmp_path / f"{t}.dcm")
    run = read_run(tmp_path)
    assert run.num_volumes == 2
    values = np.sort(run.signal_XYZT[..., 0].ravel())
    np.testing.assert_array_equal(values, np.sort(plain.pixel_array.ravel()))


def test_real_mosaics_and_other_modalities(tmp_path):
    mosaics, ct = SHARED / "mr_transfer_syntaxes" / "In", SHARED / "ct_phantom"
    if not mosaics.is_dir() or not ct.is_dir():
        pytest.skip(f"no real studies at {SHARED}")
    assert "say its order" in error(mosaics)  # one volume, nine times
    assert "no DICOM MR image" in error(ct)
    single = tmp_path / "single"
    single.mkdir()
    (single / "1.dcm").symlink_to(mosaics / "1.dcm")
    assert "single volume (1 MR files)" in error(single)
