"""What decides which frames of a study are shown and how (`data.frames`), and how they are loaded (`data.loader`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megamed.data.frames.windows import WindowName, three_windows
from megamed.data.series import PERCENTILES
from megamed.utils import UserError

# Beyond these a frame is no longer what a scanner could have shown of that anatomy.
MOST_ROTATION_DEG = 30.0
MOST_SHARE = 0.5


@dataclass
class ChoiceConfig:
    """Which frames are shown where a sample does not say.

    Attributes:
        every: every n-th frame.
        at_most: so many, spread evenly, the ends included; null is all.
    """

    every: int = 1
    at_most: int | None = 64


@dataclass
class AugmentConfig:
    """How training frames are varied. Draws are uniform from -value to value.

    Attributes:
        enabled: whether they are.
        rotate_deg: rotation about the centre, degrees.
        scale: change of size, a share of it.
        translate: shift along each axis, a share of the frame's edge.
        brightness: added to values from 0 to 1.
        contrast: change of the contrast about 0.5, a share of it.
        gamma: change of the exponent of values from 0 to 1, as its natural logarithm.
        noise: standard deviation of Gaussian noise on values from 0 to 1: drawn from 0 to this.
        flip_lr: mirrors left and right in half of the samples. What reports say of sides is then wrong.
    """

    enabled: bool = False
    rotate_deg: float = 5.0
    scale: float = 0.05
    translate: float = 0.03
    brightness: float = 0.05
    contrast: float = 0.1
    gamma: float = 0.1
    noise: float = 0.01
    flip_lr: bool = False


@dataclass
class FramesConfig:
    """How studies, pictures and films become frames.

    Attributes:
        ct_windows: the three channels of CT: names of `windows.WINDOWS` or [centre, width] in HU.
        ct_head_windows: the same of heads (body part HEAD or BRAIN).
        ct_channels: `windows` shows each slice through the three windows; `adjacent` shows the slice below, the slice
            and the slice above in the three channels, all through the first window.
        mr_percentiles: of a series, that become 0 and 1: of MR, and of whatever has no window of its own.
        run: a run in time: one `mosaic` of all slices a volume, its `slices`, or the mean signals of an atlas's
            `parcels`.
        atlas: NIfTI file of the parcels, one number each, 0 outside.
        parcel_volumes: volumes in one frame of parcels.
        parcel_percent: signal change, in percent, that becomes 1 (and its negative 0) in a frame of parcels.
        min_tiles, max_tiles: tiles that a picture is cut into.
        thumbnail: whether the whole picture follows its tiles.
        choice: which frames of a series or a film.
        interpolation: `cubic`, which InternVL's image processor takes, or `linear`; or `pillow`, cubic with the
            rounding of that processor's own library, so that pictures of 8 bits have its pixels to the last grey level
            (whatever else there is, is resized as with `cubic`).
        augment: how training frames are varied.
    """

    ct_windows: tuple[WindowName, ...] = ("lung", "mediastinum", "bone")
    ct_head_windows: tuple[WindowName, ...] = ("brain", "subdural", "bone")
    ct_channels: Literal["windows", "adjacent"] = "windows"
    mr_percentiles: tuple[float, float] = (0.5, 99.5)
    run: Literal["mosaic", "slices", "parcels"] = "mosaic"
    atlas: str = ""
    parcel_volumes: int = 64
    parcel_percent: float = 3.0
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    choice: ChoiceConfig = field(default_factory=ChoiceConfig)
    interpolation: Literal["cubic", "linear", "pillow"] = "cubic"
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class LoaderConfig:
    """How pixels get onto the device.

    Attributes:
        backend: `dali`, `numpy`, or `auto`: DALI where frames go to a GPU and it is installed. On a CPU the NumPy
            loader is the faster one.
        threads: that read and, on a CPU, make frames; 0 takes this rank's share of the cores.
        batch: frames that DALI works on at once.
        prefetch_frames: loaded ahead of the step that needs them; 0 loads none ahead.
        pinned: make NumPy's frames for a GPU in page-locked memory. What DALI passes to a GPU always is.
        gds: read voxels straight into the GPU's memory (GPUDirect Storage).
    """

    backend: Literal["auto", "dali", "numpy"] = "auto"
    threads: int = 0
    batch: int = 16
    prefetch_frames: int = 64
    pinned: bool = True
    gds: bool = False


def validate_frames(config: FramesConfig, path: str = "data.frames") -> None:
    """Check every value that the config alone can judge.

    Raises:
        UserError: a value is out of its range; the message names the key, the value and the range.
    """
    three_windows(config.ct_windows, f"{path}.ct_windows")
    three_windows(config.ct_head_windows, f"{path}.ct_head_windows")
    low, high = config.mr_percentiles
    known = ", ".join(f"{value:g}" for value in PERCENTILES)
    augment, choice = config.augment, config.choice
    rules = [
        ("mr_percentiles", list(config.mr_percentiles), low in PERCENTILES and high in PERCENTILES and low < high,
         f"two of those that ingest measures, the lower first: {known}"),
        ("atlas", config.atlas, bool(config.atlas) or config.run != "parcels",
         "a NIfTI file of parcels where run is 'parcels'"),
        ("parcel_volumes", config.parcel_volumes, config.parcel_volumes >= 1, "at least 1"),
        ("parcel_percent", config.parcel_percent, config.parcel_percent > 0, "above 0"),
        ("min_tiles", config.min_tiles, config.min_tiles >= 1, "at least 1"),
        ("max_tiles", config.max_tiles, config.max_tiles >= config.min_tiles,
         f"at least min_tiles = {config.min_tiles}"),
        ("choice.every", choice.every, choice.every >= 1, "at least 1"),
        ("choice.at_most", choice.at_most, choice.at_most is None or choice.at_most >= 1, "at least 1, or null"),
        ("augment.rotate_deg", augment.rotate_deg, 0 <= augment.rotate_deg <= MOST_ROTATION_DEG,
         f"from 0 to {MOST_ROTATION_DEG:g}"),
        *((f"augment.{name}", getattr(augment, name), 0 <= getattr(augment, name) <= MOST_SHARE,
           f"from 0 to {MOST_SHARE:g}") for name in ("scale", "translate", "brightness", "contrast", "gamma", "noise")),
    ]
    _check(rules, path)


def validate_loader(config: LoaderConfig, path: str = "data.loader") -> None:
    """As `validate_frames`."""
    _check([
        ("threads", config.threads, config.threads >= 0, "at least 1, or 0 for this rank's share of the cores"),
        ("batch", config.batch, config.batch >= 1, "at least 1"),
        ("prefetch_frames", config.prefetch_frames, config.prefetch_frames >= 0, "0 or more"),
        ("gds", config.gds, not (config.gds and config.backend == "numpy"), "false with backend 'numpy'"),
    ], path)


def _check(rules: list[tuple[str, object, bool, str]], path: str) -> None:
    for key, value, holds, wanted in rules:
        if not holds:
            raise UserError(f"{path}.{key} is {value!r}; it has to be {wanted}", everywhere=True)
