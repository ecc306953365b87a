"""Windows by name, and what is refused of `data.frames` and `data.loader`."""

import subprocess
import sys

import pytest

from megamed.config import load
from megamed.data.frames import WINDOWS, FramesConfig, LoaderConfig, validate_frames, validate_loader
from megamed.data.frames.windows import three_windows, window
from megamed.utils import UserError


def test_windows_are_centre_and_width():
    assert window("lung", "") == (-1350.0, 150.0)
    assert window((40, 80), "") == window("brain", "") == (0.0, 80.0)
    assert three_windows(["brain"], "") == (window("brain", ""),) * 3
    assert {len(three_windows((name,), "")) for name in WINDOWS} == {3}
    with pytest.raises(UserError, match=r"studies.windows: there is no CT window 'lungs'; give one of lung, "):
        window("lungs", "studies.windows")
    with pytest.raises(UserError, match=r"a window of \[40, 0\] has no width"):
        window((40, 0), "x")
    with pytest.raises(UserError, match="x has 2 windows; give three"):
        three_windows(["lung", "bone"], "x")


def test_defaults_are_valid_and_yaml_loads():
    values = {"ct_windows": ["lung", [40, 80], "bone"], "mr_percentiles": [1, 99], "choice": {"at_most": None},
              "augment": {"enabled": True}}
    config = load(FramesConfig, values, "data.frames")
    validate_frames(config)
    validate_frames(FramesConfig())
    validate_loader(LoaderConfig())
    assert config.ct_windows[1] == (40.0, 80.0) and config.choice.at_most is None


@pytest.mark.parametrize(("values", "message"), [
    ({"ct_windows": ["lung", "bone"]}, "data.frames.ct_windows has 2 windows"),
    ({"ct_head_windows": ["brian"]}, "data.frames.ct_head_windows: there is no CT window 'brian'"),
    ({"mr_percentiles": [0.5, 98.0]}, r"mr_percentiles is \[0.5, 98.0\]; .* 0.5, 1, 50, 99, 99.5"),
    ({"mr_percentiles": [99.0, 1.0]}, "the lower first"),
    ({"run": "parcels"}, "data.frames.atlas is ''; it has to be a NIfTI file"),
    ({"parcel_volumes": 0}, "data.frames.parcel_volumes is 0; it has to be at least 1"),
    ({"parcel_percent": 0.0}, "data.frames.parcel_percent is 0.0"),
    ({"min_tiles": 0}, "data.frames.min_tiles is 0"),
    ({"min_tiles": 4, "max_tiles": 3}, "at least min_tiles = 4"),
    ({"choice": {"every": 0}}, "data.frames.choice.every is 0"),
    ({"choice": {"at_most": 0}}, "data.frames.choice.at_most is 0; .* or null"),
    ({"augment": {"rotate_deg": 90.0}}, "data.frames.augment.rotate_deg is 90.0; it has to be from 0 to 30"),
    ({"augment": {"noise": -0.1}}, "data.frames.augment.noise is -0.1; it has to be from 0 to 0.5"),
])
def test_frames_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        validate_frames(load(FramesConfig, values, "data.frames"))


@pytest.mark.parametrize(("values", "message"), [
    ({"threads": -1}, "data.loader.threads is -1"),
    ({"batch": 0}, "data.loader.batch is 0; it has to be at least 1"),
    ({"prefetch_frames": -1}, "data.loader.prefetch_frames is -1"),
    ({"gds": True, "backend": "numpy"}, "data.loader.gds is True; it has to be false with backend 'numpy'"),
])
def test_loader_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        validate_loader(load(LoaderConfig, values, "data.loader"))


def test_planning_does_without_torch():
    modules = "spec config windows choice plan tiles parcels pictures raw reference augment"
    imports = "; ".join(f"import megamed.data.frames.{name}" for name in modules.split())
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
