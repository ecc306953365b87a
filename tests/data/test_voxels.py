"""Types that hold every value, and percentiles by counting."""

import numpy as np
import pytest

from megamed.data import voxels as module
from megamed.data.series import PERCENTILES
from megamed.data.voxels import percentiles, smallest_dtype, to_smallest


@pytest.mark.parametrize(("values", "expected"), [
    (np.array([0, 255]), "uint8"),
    (np.array([-1, 255]), "int16"),
    (np.array([0, 32767], np.uint16), "int16"),
    (np.array([0, 65535]), "uint16"),
    (np.array([-1, 32768]), "float32"),
    (np.array([0, 65536]), "float32"),
    (np.array([0.0, 3.0]), "uint8"),
    (np.array([-1024.0, 3000.0]), "int16"),
    (np.array([0.0, 0.5]), "float32"),
    (np.array([0.0, np.nan]), "float32"),
    (np.array([0.0, np.inf]), "float32"),
    (np.array([], np.int32), "uint8"),
    (np.array([False, True]), "uint8"),
])
def test_smallest_dtype(values, expected):
    assert smallest_dtype(values) == expected
    stored = to_smallest(values)
    assert stored.dtype == expected
    np.testing.assert_array_equal(stored, values)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_percentiles_are_those_of_numpy(dtype):
    rng = np.random.default_rng(0)
    values = (rng.gamma(2, 20, (3, 500, 701)) - (30 if dtype in ("int16", "float32") else 0)).astype(dtype)
    found = percentiles(values)
    assert list(found) == [str(p) for p in PERCENTILES]
    np.testing.assert_array_equal(list(found.values()), np.percentile(values, PERCENTILES, method="inverted_cdf"))


def test_many_floats_are_looked_at_in_part(monkeypatch):
    monkeypatch.setattr(module, "_MOST_SORTED", 10_000)
    values = np.random.default_rng(0).permutation(100_000).astype(np.float32).reshape(10, 100, 100)
    # Three standard deviations of the rank of a median of 10,000 are 1.5 % of 100,000.
    assert abs(percentiles(values)["50.0"] - 50_000) < 1_500
    assert percentiles(np.array([], np.float32)) == {}
