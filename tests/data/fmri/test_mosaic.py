"""Frames of a stretch: where things lie, and what the three channels say."""

import numpy as np
import pytest
import torch

from megamed.data import mosaic_frames, read_run
from megamed.data.fmri.mosaic import HEAD_SCALE, IMAGENET_MEAN, IMAGENET_STD, VOXEL_SCALE, measure_scale

# One rounding of float32 each: to the normalised value and back.
ROUNDING = 2e-6


def unit(frames_TCHW: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation."""
    std, mean = torch.tensor(IMAGENET_STD), torch.tensor(IMAGENET_MEAN)
    return frames_TCHW * std.view(3, 1, 1) + mean.view(3, 1, 1)


def head(percent) -> np.ndarray:
    """8 x 8 x 4 voxels: a head of 6 x 6 of signal 1000 in air, changed by `percent` in each volume."""
    signal = np.zeros((8, 8, 4, len(percent)), np.float32)
    signal[1:7, 1:7] = 1000 * (1 + np.asarray(percent) / 100)
    return signal


def test_shape_type_and_repeatability():
    stretch = read_run("nibabel:functional.nii").signal_XYZT[..., :5]
    frames = mosaic_frames(stretch, 56)
    assert frames.shape == (5, 3, 56, 56) and frames.dtype == torch.float32
    assert torch.equal(frames, mosaic_frames(stretch.copy(), 56))
    assert float(unit(frames).min()) >= -ROUNDING and float(unit(frames).max()) <= 1 + ROUNDING
    assert mosaic_frames(stretch, 56, []).shape == (0, 3, 56, 56)


def test_a_few_frames_are_those_of_the_whole_stretch():
    stretch = read_run("nibabel:functional.nii").signal_XYZT[..., 3:9]
    some = mosaic_frames(stretch, 28, [4, 1], measure_scale(stretch))
    assert torch.equal(some, mosaic_frames(stretch, 28)[[4, 1]])


def test_slices_lie_row_by_row_with_the_front_up_and_left_on_the_left():
    signal = np.zeros((8, 8, 4, 2), np.float32)
    signal[0, 0, 0] = 100  # left back corner of the lowest slice
    signal[7, 7, 1] = 200  # right front corner of the second
    signal[0, 7, 2] = 300  # left front corner of the third
    # A size of 16 is the mosaic itself: two by two slices of 8 x 8.
    frame = unit(mosaic_frames(signal, 16))[0, 0]
    lit = {tuple(place) for place in (frame > 0.1).nonzero().tolist()}
    assert lit == {(7, 0), (0, 15), (8, 0)}


def test_mosaic_is_padded_and_not_stretched():
    signal = np.full((4, 8, 1, 2), 10, np.float32)
    signal[0, 0] = 0
    frame = unit(mosaic_frames(signal, 8))[0, 0]
    assert (frame[:, :2] == frame[0, 0]).all() and (frame[:, 6:] == frame[0, 0]).all()
    assert float(frame[0, 3]) > 0.5


def test_channels_say_how_much_changed():
    percent = [0.3, -0.1, -0.2]  # their mean is nothing, so these are the changes against the mean volume
    frames = unit(mosaic_frames(head(percent), 16))
    for frame, change in zip(frames, percent, strict=True):
        # float32 voxels of 1000 carry a change of 0.1 % to about 1e-6; normalising costs as much again.
        assert float(frame[1, 4, 4]) == pytest.approx(0.5 + 0.5 * change / VOXEL_SCALE, abs=1e-5)
        assert float(frame[2, 4, 4]) == pytest.approx(0.5 + 0.5 * np.tanh(change / HEAD_SCALE), abs=1e-4)
        # Air: dark, and without change.
        torch.testing.assert_close(frame[:, 0, 0], torch.tensor([0.0, 0.5, 0.5]), atol=ROUNDING, rtol=0)


def test_one_voxel_leaves_the_head_alone():
    signal = head([0.0, 0.0, 0.0])
    signal[3, 3, 0, 1] *= 1.2
    frames = unit(mosaic_frames(signal, 16))
    row, column = 7 - 3, 3
    assert float(frames[1, 1, row, column]) == pytest.approx(1.0, abs=ROUNDING)  # beyond +3 %: clipped
    assert float(frames[1, 1, row, column + 1]) == pytest.approx(0.5, abs=ROUNDING)
    inside = frames[1, 2, 1:7, 1:7]
    assert float(inside.max() - inside.min()) <= ROUNDING  # one value all over the head
    change = 20 * (1 - 1 / 3) / (6 * 6 * 4)  # 20 % of one of 144 voxels, against the mean of three volumes
    assert float(inside[0, 0]) == pytest.approx(0.5 + 0.5 * np.tanh(change / HEAD_SCALE), abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_and_single_volumes_are_finite(value):
    for num_volumes in (1, 3):
        frames = mosaic_frames(np.full((5, 4, 3, num_volumes), value, np.float32), 14)
        assert torch.isfinite(frames).all()
        # Rounding of the mean in time, scaled up by the 0.5 / 0.2 % of channel 2.
        torch.testing.assert_close(unit(frames)[:, 1:], torch.full_like(frames[:, 1:], 0.5), atol=1e-4, rtol=0)
