"""Facts of stretches whose truth is known because it was put in."""

import numpy as np
import pytest

from megamed.data import measure, read_run
from megamed.data.fmri.facts import head_mask

VOXEL = (3.0, 3.0, 3.5)


def stretch(percent, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A head of signal 1000 in dark air, whose mean changes by `percent` from volume to volume."""
    percent = np.asarray(percent, float)
    signal = np.full((10, 12, 4, len(percent)), 5.0, np.float32)
    head = 1000.0 * (1 + percent / 100)
    signal[2:8, 2:10] = head + noise * np.random.default_rng(seed).standard_normal((6, 8, 4, len(percent)))
    return signal


def test_mask_is_the_head():
    mask = head_mask(stretch([0, 0]).mean(axis=3))
    assert mask[2:8, 2:10].all() and mask.sum() == 6 * 8 * 4


def test_plain_facts():
    facts = measure(stretch([0.0, 0.2, -0.2, 0.0, 0.0]), VOXEL, 1.5)
    assert facts.voxel_size_mm == VOXEL and facts.repetition_time_s == 1.5
    assert facts.num_volumes == 5 and facts.duration_s == 7.5
    assert facts.mean_signal == pytest.approx(1000, abs=1e-3)  # float32 voxels
    assert facts.brightest_volume == 1


@pytest.mark.parametrize(
    "slope, word", [(0.5, "up"), (-0.5, "down"), (0.1, "none"), (-0.1, "none"), (0.0, "none")]
)
def test_drift_in_percent_per_minute(slope, word):
    facts = measure(stretch(np.linspace(0, slope, 31)), VOXEL, 2.0)  # 30 steps of 2 s are one minute
    # Percent of the mean over the stretch, not of its first volume: half the slope lower, under 0.3 % here.
    assert facts.drift_percent_per_min == pytest.approx(slope, rel=3e-3, abs=1e-4)
    assert facts.drift == word


def test_temporal_snr_against_the_noise_put_in():
    facts = measure(stretch(np.zeros(100), noise=20.0), VOXEL, 2.0)
    # 1000 / 20; the median over 192 voxels of estimates that scatter by 7 % each is good to 1 % or so.
    assert facts.temporal_snr == pytest.approx(50, rel=0.03)


@pytest.mark.parametrize(
    "percent, third",
    [
        ([0.3, 0.2, 0, 0, 0, 0], "first"),
        ([0, 0, 0.1, 0.2, 0, 0], "middle"),
        ([0, 0, 0, 0, 0, 0.1], "last"),
        ([0, 0, 0.5, 0.1], "middle"),  # thirds of 2, 1 and 1 volumes
        ([0, 0, 0], "none"),
        ([0.1, 0.1 + 1e-3, 0], "none"),  # leads by a thousandth of a percent
        ([0.5, 0], "none"),  # two volumes have no thirds
        ([0.0], "none"),
    ],
)
def test_brightest_third(percent, third):
    assert measure(stretch(percent), VOXEL, 2.0).brightest_third == third


@pytest.mark.parametrize("value", [0.0, 100.0])
def test_constant_signal_measures_as_nothing(value):
    facts = measure(np.full((4, 4, 2, 6), value, np.float32), VOXEL, 2.0)
    assert (facts.temporal_snr, facts.drift, facts.brightest_third) == (0.0, "none", "none")
    assert facts.mean_signal == value and facts.drift_percent_per_min == pytest.approx(0, abs=1e-9)


def test_real_run():
    run = read_run("nibabel:functional.nii")
    facts = measure(run.signal_XYZT, run.voxel_size_mm, run.repetition_time_s)
    assert facts.num_volumes == 20 and facts.duration_s == 40
    # The brain fills the grid, so the head is all but a few voxels and its mean nearly that of the file.
    assert facts.mean_signal == pytest.approx(float(run.signal_XYZT.mean()), rel=0.01)
    assert 50 < facts.temporal_snr < 200  # a usual range at 3 T
    assert facts.brightest_volume == 4
