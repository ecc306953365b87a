"""NIfTI runs: values, orientation, units, and one line for every bad file."""

import gzip
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from megamed.data import read_run
from megamed.data.fmri.run import NIBABEL_RUN
from megamed.utils import UserError

FUNCTIONAL = Path(nibabel.__file__).parent / "tests" / "data" / "functional.nii"


def write(path: Path, data: np.ndarray, affine=None, tr: float = 2.0, unit: str = "sec", **header) -> Path:
    image = nibabel.Nifti1Image(data, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine)
    if data.ndim > 3:
        image.header["pixdim"][4] = tr
    image.header.set_xyzt_units("mm", unit)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def signal(shape=(4, 5, 3, 6)) -> np.ndarray:
    return np.random.default_rng(0).uniform(100, 200, shape).astype(np.float32)


def test_real_run_matches_its_bytes():
    run = read_run(NIBABEL_RUN)
    assert run.signal_XYZT.shape == (17, 21, 3, 20) and run.signal_XYZT.dtype == np.float32
    assert run.voxel_size_mm == (4.0, 4.0, 8.0) and run.repetition_time_s == 2.0
    assert run.source == "functional.nii" and run.num_volumes == 20
    # The file is int16 and scaled by its Analyze-style header, X from right to left.
    proxy = nibabel.Nifti1Image.from_filename(FUNCTIONAL).dataobj
    raw = np.fromfile(FUNCTIONAL, "<i2", offset=352).reshape(17, 21, 3, 20, order="F")
    expected = raw[::-1] * proxy.slope + proxy.inter
    np.testing.assert_array_equal(run.signal_XYZT, expected.astype(np.float32))
    np.testing.assert_array_equal(run.affine, [[4, 0, 0, -32], [0, 4, 0, -40], [0, 0, 8, 0], [0, 0, 0, 1]])


def test_oblique_run_keeps_every_voxel_where_it_was(tmp_path):
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    # First axis down, second to the left, third to the front.
    affine[:3, :3] = turn @ np.array([[0, -3.0, 0], [0, 0, 4.0], [-2.0, 0, 0]])
    affine[:3, 3] = [10, -20, 30]
    data = signal()
    run = read_run(write(tmp_path / "oblique.nii", data, affine))
    assert nibabel.aff2axcodes(run.affine) == ("R", "A", "S")
    assert run.voxel_size_mm == (3.0, 4.0, 2.0)
    for index in [(0, 0, 0), (3, 1, 2), (2, 4, 0)]:
        world = affine @ [*index, 1]
        found = np.linalg.inv(run.affine) @ world
        nearest = np.round(found[:3]).astype(int)
        np.testing.assert_allclose(found[:3], nearest, atol=1e-4)  # the header keeps the affine in float32
        np.testing.assert_array_equal(run.signal_XYZT[tuple(nearest)], data[index])


@pytest.mark.parametrize(
    "value, unit, seconds, warns",
    [
        (2.0, "sec", 2.0, False),
        (0.72, "sec", 0.72, False),
        (2000.0, "msec", 2.0, False),
        (2.0e6, "usec", 2.0, False),
        (1.5, "unknown", 1.5, False),
        (2000.0, "sec", 2.0, True),
        (2.0, "msec", 2.0, True),
        (800.0, "unknown", 0.8, True),
    ],
)
def test_repetition_time_in_any_unit(tmp_path, caplog, value, unit, seconds, warns):
    with caplog.at_level(logging.WARNING, logger="megamed.data"):
        run = read_run(write(tmp_path / "run.nii", signal(), tr=value, unit=unit))
    assert run.repetition_time_s == seconds
    assert ("repetition time" in caplog.text) == warns


def test_scaling_and_compression_and_trailing_axis(tmp_path):
    stored = np.arange(2 * 2 * 2 * 3, dtype=np.int16).reshape(2, 2, 2, 3, 1) + 10
    path = write(tmp_path / "plain.nii", stored)
    image = bytearray(path.read_bytes())
    image[112:120] = np.array([0.5, 7.0], "<f4").tobytes()  # scl_slope, scl_inter
    packed = tmp_path / "run.nii.gz"
    packed.write_bytes(gzip.compress(bytes(image)))
    np.testing.assert_array_equal(read_run(packed).signal_XYZT, stored[..., 0] * 0.5 + 7.0)


def test_spatial_unit(tmp_path):
    image = nibabel.Nifti1Image(signal(), np.diag([2000.0, 3000.0, 4000.0, 1.0]))
    image.header["pixdim"][4] = 2.0
    image.header.set_xyzt_units("micron", "sec")
    nibabel.save(image, tmp_path / "run.nii")
    run = read_run(tmp_path / "run.nii")
    assert run.voxel_size_mm == (2.0, 3.0, 4.0)


def test_unknown_orientation_is_said(tmp_path, caplog):
    image = nibabel.Nifti1Image(signal(), None)
    image.header["pixdim"][4] = 2.0
    nibabel.save(image, tmp_path / "run.nii")
    with caplog.at_level(logging.WARNING, logger="megamed.data"):
        read_run(tmp_path / "run.nii")
    assert "left and right may be swapped" in caplog.text


def test_bad_files_are_one_line_with_the_mend(tmp_path):
    def error(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_run(path)
        text = str(caught.value)
        assert str(path) in text and "\n" not in text
        return text

    assert "does not exist" in error(tmp_path / "none.nii")

    whole = write(tmp_path / "whole.nii", signal())
    cut = tmp_path / "cut.nii"
    cut.write_bytes(whole.read_bytes()[:-100])
    assert "cut short" in error(cut)
    packed = tmp_path / "cut.nii.gz"
    packed.write_bytes(gzip.compress(whole.read_bytes())[:-200])
    assert "cut short" in error(packed)
    head = tmp_path / "head.nii"
    head.write_bytes(whole.read_bytes()[:200])
    assert "cannot be read as NIfTI" in error(head)
    text = tmp_path / "notes.nii"
    text.write_text("not an image\n" * 100)
    assert "cannot be read as NIfTI" in error(text)
    other = tmp_path / "run.txt"
    other.write_text("not an image")
    assert "cannot be read as NIfTI" in error(other)
    assert "not NIfTI" in error(FUNCTIONAL.parent / "test.mgz")

    said = error(write(tmp_path / "one.nii", signal((17, 21, 3))))
    assert "has 1 volume (17 x 21 x 3)" in said and "at least 2" in said and "give a 4D file" in said
    assert "has 1 volume" in error(write(tmp_path / "one4.nii", signal((4, 4, 4, 1))))
    assert "5 dimensions" in error(write(tmp_path / "five.nii", signal((4, 4, 4, 3, 2))))
    assert "complex" in error(write(tmp_path / "complex.nii", signal().astype(np.complex64)))

    holes = signal()
    holes[1, 1, 1, 1:3] = np.nan
    assert "2 voxels that are not finite" in error(write(tmp_path / "nan.nii", holes))
    centred = signal() - signal().mean(axis=3, keepdims=True)
    assert "before demeaning" in error(write(tmp_path / "demeaned.nii", centred))
    assert "signal above zero" in error(write(tmp_path / "zero.nii", np.zeros((4, 4, 4, 5), np.float32)))

    assert "no repetition time" in error(write(tmp_path / "tr0.nii", signal(), tr=0.0))
    assert "impossible repetition time" in error(write(tmp_path / "tr9.nii", signal(), tr=1e9))
    assert "hz" in error(write(tmp_path / "hz.nii", signal(), unit="hz"))
    assert "no valid units" in error(write(tmp_path / "units.nii", signal(), xyzt_units=7))
