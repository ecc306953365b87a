"""Augmentation: what is drawn, and what it does to a frame. That DALI does the same is in test_frame_pixels."""

from dataclasses import replace

import numpy as np
import pytest

from megamed.data.frames import StudyFrame
from megamed.data.frames.augment import Augmentation, draw
from megamed.data.frames.config import AugmentConfig

FRAME = StudyFrame("v.npy", 0, (3, 3, 3), ((0.0, 1.0),) * 3)
NOTHING = AugmentConfig(True, 0, 0, 0, 0, 0, 0, 0)
SIZE = 32


def unchanged(**changes) -> Augmentation:
    same = Augmentation(np.eye(2, 3, dtype=np.float32), 1.0, 1.0, 0.0, np.zeros((SIZE, SIZE), np.float32))
    return replace(same, **changes)


def test_draws_are_the_seeds_alone():
    config = AugmentConfig(enabled=True)
    first, again = draw(config, 5, FRAME, SIZE), draw(config, 5, FRAME, SIZE)
    assert (first.matrix == again.matrix).all() and (first.noise_HW == again.noise_HW).all()
    # Slices of one patient move together; their noise is their own.
    beside = draw(config, 5, replace(FRAME, slices=(4, 4, 4)), SIZE)
    assert (first.matrix == beside.matrix).all() and first.gamma == beside.gamma
    assert abs(np.corrcoef(first.noise_HW.ravel(), beside.noise_HW.ravel())[0, 1]) < 0.2
    other = draw(config, 6, FRAME, SIZE)
    assert (first.matrix != other.matrix).any() and first.brightness != other.brightness
    # What one setting draws does not depend on the others.
    assert draw(replace(config, rotate_deg=0.0, noise=0.0), 5, FRAME, SIZE).gamma == first.gamma


def test_draws_stay_in_their_bounds_and_fill_them():
    config = AugmentConfig(enabled=True)
    drawn = [draw(config, seed, FRAME, SIZE) for seed in range(300)]
    angles = np.degrees([np.arctan2(d.matrix[0, 1], d.matrix[0, 0]) for d in drawn])
    scales = np.array([1 / np.sqrt(np.linalg.det(d.matrix[:, :2].astype(float))) for d in drawn])
    middles = np.array([d.matrix.astype(float) @ [SIZE / 2, SIZE / 2, 1] - SIZE / 2 for d in drawn])
    for values, bound in (
        (angles, 5), (scales - 1, 0.05), ([d.brightness for d in drawn], 0.05), ([d.contrast - 1 for d in drawn], 0.1),
        (np.log([d.gamma for d in drawn]), 0.1),
    ):
        assert 0.95 * bound < np.abs(values).max() <= bound * 1.0001
    # The middle moves by up to 3 % along each axis, turned and scaled.
    assert 0.025 * SIZE < np.abs(middles).max() < 0.03 * SIZE * 1.2
    assert max(d.noise_HW.std() for d in drawn) == pytest.approx(0.01, rel=0.1)


def test_nothing_is_mirrored_but_on_demand():
    assert all(np.linalg.det(draw(AugmentConfig(True), s, FRAME, SIZE).matrix[:, :2]) > 0 for s in range(100))
    mirrored = [draw(replace(NOTHING, flip_lr=True), s, FRAME, SIZE) for s in range(100)]
    flips = [d for d in mirrored if np.linalg.det(d.matrix[:, :2]) < 0]
    assert 30 < len(flips) < 70
    planes = np.random.default_rng(0).random((1, SIZE, SIZE), np.float32)
    np.testing.assert_allclose(flips[0].apply(planes), planes[:, :, ::-1], atol=1e-6)


def test_what_each_does():
    planes = np.random.default_rng(0).random((3, SIZE, SIZE), np.float32)
    np.testing.assert_array_equal(unchanged().apply(planes), planes)
    np.testing.assert_allclose(unchanged(gamma=2.0).apply(planes), planes**2, atol=1e-6)
    np.testing.assert_allclose(unchanged(contrast=0.5).apply(planes), planes / 2 + 0.25, atol=1e-6)
    np.testing.assert_allclose(unchanged(brightness=0.5).apply(planes), np.minimum(planes + 0.5, 1), atol=1e-6)
    noise = np.random.default_rng(1).normal(0, 1, (SIZE, SIZE)).astype(np.float32)
    np.testing.assert_allclose(unchanged(noise_HW=noise).apply(planes), np.clip(planes + noise, 0, 1), atol=1e-6)
    # Two and a half columns to the right, one row up: what comes in is dark.
    moved = unchanged(matrix=np.array([[1, 0, -2.5], [0, 1, 1]], np.float32)).apply(planes)
    between = (planes[:, 1:, :-3] + planes[:, 1:, 1:-2]) / 2
    np.testing.assert_allclose(moved[:, :-1, 3:], between, atol=1e-6)
    np.testing.assert_allclose(moved[:, :-1, 2], planes[:, 1:, 0] / 2, atol=1e-6)
    assert not moved[:, :, :2].any() and not moved[:, -1].any()
    # Far outside, in every direction, all is dark.
    for shift in (-1000, 1000):
        assert not unchanged(matrix=np.array([[1, 0, shift], [0, 1, -shift]], np.float32)).apply(planes).any()


def test_a_turn_is_about_the_middle():
    planes = np.zeros((1, SIZE, SIZE), np.float32)
    planes[0, 10:22, 15:17] = 1  # an upright bar
    config = replace(NOTHING, rotate_deg=30.0)
    seed = max(range(40), key=lambda s: abs(draw(config, s, FRAME, SIZE).matrix[0, 1]))
    turned = draw(config, seed, FRAME, SIZE).apply(planes)[0]
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    assert (turned * rows).sum() / turned.sum() == pytest.approx(16, abs=0.05)
    assert (turned * columns).sum() / turned.sum() == pytest.approx(16, abs=0.05)
    assert turned.sum() == pytest.approx(planes.sum(), rel=0.02) and turned[10:22, 15:17].sum() < 0.8 * planes.sum()
