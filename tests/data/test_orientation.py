"""Canonical orientation: every way a grid can lie, against the table of `megamed.data.series`."""

import itertools

import nibabel
import numpy as np
import pytest

from megamed.data.orientation import canonical

# The table of series.py in nibabel's letters for where W, H and S run to.
CODES = {"axial": ("L", "P", "S"), "coronal": ("L", "I", "P"), "sagittal": ("P", "I", "L")}
SLICE_NORMAL = {"axial": 2, "coronal": 1, "sagittal": 0}


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_way_a_grid_can_lie(order, slice_axis):
    """All 48 axis-aligned grids, a little rotated: the letters are the table's, and every voxel stays where it was."""
    rng = np.random.default_rng(0)
    voxels = rng.normal(size=(3, 4, 5, 2))
    small = np.deg2rad(8)
    rotation = np.array([[np.cos(small), -np.sin(small), 0], [np.sin(small), np.cos(small), 0], [0, 0, 1.0]])
    for signs in itertools.product((-1, 1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = rotation @ (np.eye(3)[:, order] * signs) @ np.diag([2.0, 3.0, 5.0])
        affine[:3, 3] = [7, -11, 13]
        turned, affine_turned, plane = canonical(voxels, affine, slice_axis)
        assert SLICE_NORMAL[plane] == order[slice_axis]
        assert nibabel.aff2axcodes(affine_turned) == CODES[plane]
        assert np.shares_memory(turned, voxels)
        back = np.linalg.inv(affine)
        for t, s, h, w in itertools.product(*map(range, turned.shape)):
            i, j, k = np.rint(back @ affine_turned @ [w, h, s, 1]).astype(int)[:3]
            assert turned[t, s, h, w] == voxels[i, j, k, t]


def test_a_tilted_stack_keeps_its_shear():
    affine = np.array([[-0.5, 0, 0, 100], [0, -0.5, 1.5, 90], [0, 0, 5.0, -20], [0, 0, 0, 1]])
    turned, affine_turned, plane = canonical(np.zeros((4, 4, 3)), affine, 2)
    assert plane == "axial" and turned.shape == (1, 3, 4, 4)
    np.testing.assert_array_equal(affine_turned, affine)


def test_an_oblique_stack_takes_the_nearest_plane():
    for degrees, expected in ((40, "axial"), (50, "coronal")):
        angle = np.deg2rad(degrees)
        affine = np.eye(4)
        affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        assert canonical(np.zeros((2, 2, 2)), affine, 2)[2] == expected


@pytest.mark.parametrize("broken", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.ones((4, 4))])
def test_an_affine_that_does_not_span_space(broken):
    with pytest.raises(ValueError, match="span space"):
        canonical(np.zeros((2, 2, 2)), broken, 2)
