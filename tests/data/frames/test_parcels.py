"""Carpets of parcels: where an atlas lies in a run, what its parcels do in time, and that it is computed once."""

import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from megamed.data.frames import FramesConfig, LoaderConfig
from megamed.data.frames import parcels as module
from megamed.data.frames.config import ChoiceConfig
from megamed.data.frames.loader import build_loader
from megamed.data.frames.parcels import carpet
from megamed.data.frames.plan import plan_series
from megamed.data.frames.reference import resize_matrix
from megamed.data.samples.schema import FrameChoice, StudyRef
from megamed.data.series import SeriesInfo
from megamed.utils import UserError

# A run of 10 volumes, 4 slices of 6 x 8 voxels of 3 mm. Canonical orientation: columns run to the patient's left, rows
# to the back, so the voxel of column w, row h, slice s lies at x = 9 - 3 w, y = 6 - 3 h, z = 3 s mm.
AFFINE = ((-3.0, 0, 0, 9.0), (0, -3.0, 0, 6.0), (0, 0, 3.0, 0.0), (0, 0, 0, 1.0))
T, S, H, W = 10, 4, 6, 8
INFO = SeriesInfo(modality="MR", kind="run", plane="axial", shape=(T, S, H, W), affine=AFFINE, spacing_mm=(3, 3, 3),
                  repetition_time_s=2.0, percentiles={"0.5": 0.0, "99.5": 1.0})


def write_atlas(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


@pytest.fixture
def run(tmp_path) -> tuple[Path, Path, np.ndarray]:
    """Voxels, an atlas in RAS of half the voxel size, and what its parcels should do."""
    changes = np.array([np.arange(T) - 4.5, np.where(np.arange(T) % 2, 2.0, -2.0)])  # percent, of mean 0
    voxels = np.full((T, S, H, W), 500.0, np.float32)
    voxels[:, :, :, :4] = 1000 * (1 + changes[0][:, None, None, None] / 100)  # the patient's right
    voxels[:, :, :, 4:] = 400 * (1 + changes[1][:, None, None, None] / 100)
    np.save(tmp_path / "v.npy", voxels)
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = (-15, -12, -3)
    labels = np.zeros((20, 16, 12), np.int16)
    x = -15 + 1.5 * np.arange(20)
    labels[x > -1.5] = 7  # up to the middle between columns 3 and 4, and right of it
    labels[x < -1.5] = 1200
    labels[:, :, 0] = 9999  # below the run
    return tmp_path / "v.npy", write_atlas(tmp_path / "atlas.nii.gz", labels, affine), changes


def test_carpet_says_what_each_parcel_does(run, tmp_path, caplog):
    voxels, atlas, changes = run
    caplog.set_level(logging.INFO, "megamed.data")
    path, num_parcels = carpet(INFO, voxels, atlas, tmp_path / "cache" / "deep")
    found = np.load(path)
    assert found.shape == (1, 1, 3, T) and found.dtype == np.float32 and num_parcels == 3
    # By their numbers: 7 on the right, 1200 on the left, 9999 outside. float32 voxels carry 1e-5 %.
    np.testing.assert_allclose(found[0, 0], [changes[0], changes[1], np.zeros(T)], atol=1e-4)
    assert "1 of the atlas's 3 parcels lie outside a run" in caplog.text


def test_it_is_computed_once_and_whole(run, tmp_path, monkeypatch):
    voxels, atlas, _ = run
    path, _ = carpet(INFO, voxels, atlas, tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(module, "percent_change", lambda *args: pytest.fail("computed again"))
        assert carpet(INFO, voxels, atlas, tmp_path / "cache")[0] == path
    other = nibabel.load(atlas)
    changed = np.asarray(other.dataobj).copy()
    changed[0, 0, 5] = 7
    elsewhere = write_atlas(tmp_path / "other.nii", changed, other.affine)
    assert carpet(INFO, voxels, elsewhere, tmp_path / "cache")[0] != path

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module.np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        carpet(INFO, voxels, atlas, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_frames_are_blocks_of_volumes(run, tmp_path):
    voxels, atlas, changes = run
    config = FramesConfig(run="parcels", atlas=str(atlas), parcel_volumes=4, parcel_percent=5.0, interpolation="linear")
    planned = plan_series(INFO, voxels, StudyRef("s"), config, tmp_path)
    # The last block is as wide as the others.
    assert [frame.box for frame in planned.frames] == [(0, start, 3, 4) for start in (0.0, 4.0, 6.0)]
    assert planned.labels == ["t=0.0-6.0 s", "t=8.0-14.0 s", "t=12.0-18.0 s"]
    assert "3 parcels in time, 3 blocks of 4 volumes" in planned.header
    assert planned.header.endswith("black to white is ±5% signal change")
    frame = build_loader(config, LoaderConfig(), 12).load(planned.frames)[1, 0] * 0.229 + 0.485
    rows, columns = resize_matrix(3, 0, 3, 12, "linear"), resize_matrix(T, 4, 4, 12, "linear")
    wanted = 0.5 + rows @ np.vstack([changes, np.zeros(T)]) @ columns.T / 10
    np.testing.assert_allclose(frame, wanted, atol=1e-5)

    part = plan_series(INFO, voxels, StudyRef("s", frames=FrameChoice(range_s=(4, 9))), config, tmp_path)
    assert [frame.box[1:4:2] for frame in part.frames] == [(2.0, 3.0)]
    config.choice = ChoiceConfig(at_most=2)
    assert len(plan_series(INFO, voxels, StudyRef("s"), config, tmp_path).frames) == 2
    with pytest.raises(UserError, match="parcels have no positions"):
        plan_series(INFO, voxels, StudyRef("s", frames=FrameChoice(range_mm=(0, 1))), config, tmp_path)


@pytest.mark.parametrize(("values", "shift", "message"), [
    (np.ones((4, 4, 4), np.int16), 900.0, "has no parcel where a run lies; give an atlas in the space of the run"),
    (np.ones((4, 4, 4, 2), np.int16), 0.0, r"has shape \(4, 4, 4, 2\); give one volume with a number for each parcel"),
    (np.full((4, 4, 4), 0.5, np.float32), 0.0, "values that are no whole numbers"),
    (np.zeros((4, 4, 4), np.int16), 0.0, "nothing but 0"),
])
def test_an_atlas_that_does_not_fit(run, tmp_path, values, shift, message):
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[0, 3] = shift
    with pytest.raises(UserError, match=message):
        carpet(INFO, run[0], write_atlas(tmp_path / "bad.nii", values, affine), tmp_path)


def test_no_atlas(run, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        carpet(INFO, run[0], tmp_path / "none.nii", tmp_path)
    (tmp_path / "text.nii").write_text("no NIfTI")
    with pytest.raises(UserError, match="cannot be read .*; give a NIfTI file"):
        carpet(INFO, run[0], tmp_path / "text.nii", tmp_path)
