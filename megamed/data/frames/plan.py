"""From a series, a picture or a film to the frames that are shown of it, and the words beside them.

| what | frames | channels |
|---|---|---|
| CT | slices | three windows, or the slice below, the slice, the slice above |
| MR, PT, NM | slices | equal: percentiles of the series, of PT and NM from 0 |
| a run in time | a mosaic of all slices a volume, its slices, or a carpet of parcels | equal: percentiles |
| X-ray, a picture | InternVL's tiles and the whole | the header's window, else percentiles; colour as it is |
| several pictures, a film | pictures | as above |

Nothing here reads voxels, but for parcels, and for pictures of more than 8 bits, whose headers do not say which
values occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from megamed.data.frames.choice import choice_of, slice_positions, thin, volume_times, within
from megamed.data.frames.config import FramesConfig
from megamed.data.frames.parcels import carpet
from megamed.data.frames.pictures import ARRAY, PICTURES, film_header, is_film, page_times, picture_header, read_picture
from megamed.data.frames.raw import ArrayFile
from megamed.data.frames.spec import MOSAIC, PlannedStudy, StudyFrame, Window
from megamed.data.frames.tiles import tile_boxes, tile_grid
from megamed.data.frames.windows import three_windows
from megamed.data.samples.schema import FrameChoice, StudyRef
from megamed.data.series import SeriesInfo
from megamed.data.voxels import percentiles
from megamed.utils import UserError

# InternVL's edge of a frame in pixels.
FRAME_SIZE = 448

_BYTE: Window = (0.0, 255.0)
_HEADS = ("HEAD", "BRAIN", "SKULL")
# Values count what was taken up: 0 is none.
_FROM_ZERO = ("PT", "NM")
# What stands beside each other in time.
_NAMES_IN_TIME = {"volume": "volume", "run": "volume", "image": "picture"}
# At most so many values of an array of pictures are looked at for its window.
_LOOKED_AT = 1 << 20


@dataclass(frozen=True)
class _Item:
    """A volume and a slice that are shown, and what is said of them."""

    volume: int
    slice: int
    label: str


def plan_series(
    info: SeriesInfo,
    voxels_path: str | Path,
    ref: StudyRef,
    config: FramesConfig,
    cache: str | Path | None = None,
    size: int = FRAME_SIZE,
) -> PlannedStudy:
    """The frames of a series.

    Args:
        info: what is known of it.
        voxels_path: its voxels.
        ref: how a sample wants it shown.
        config: how it is shown where the sample does not say.
        cache: folder in which carpets of parcels are kept; needed where `config.run` is `parcels`.
        size: edge of a frame in pixels, by which pictures are tiled.

    Raises:
        UserError: windows or a choice of frames that the series cannot have, or an atlas that does not fit.
    """
    choice = choice_of(ref.frames, config.choice)
    if info.kind == "run" and config.run == "parcels":
        return _plan_parcels(info, voxels_path, choice, config, cache)
    windows, words = _windows(info, ref, config)
    num_volumes, num_slices, height, width = info.shape[:4]
    if info.kind == "image" and num_volumes * num_slices == 1:
        single = StudyFrame(str(voxels_path), 0, (0, 0, 0), windows)
        frames, labels = _tiled(single, height, width, config, size)
        return PlannedStudy(_header(info, "", words), frames, labels)
    if info.kind == "run" and config.run == "mosaic" and num_slices > 1 and len(info.shape) == 4:
        items, shown = _volumes(info, choice, MOSAIC)
    elif num_volumes > 1:
        items, shown = _slices_in_time(info, choice)
    else:
        items, shown = _slices(info, choice)
    adjacent = _is_ct(info) and config.ct_channels == "adjacent"

    def slices_of(index: int) -> tuple[int, int, int]:
        beside = 1 if adjacent else 0
        return max(index - beside, 0) if index != MOSAIC else index, index, min(index + beside, num_slices - 1)

    frames = [StudyFrame(str(voxels_path), item.volume, slices_of(item.slice), windows) for item in items]
    return PlannedStudy(_header(info, shown, words), frames, [item.label for item in items])


def plan_image(path: str | Path, config: FramesConfig, size: int = FRAME_SIZE) -> PlannedStudy:
    """The frames of a picture's file: tiles and the whole.

    Raises:
        UserError: the file cannot be read as a picture.
    """
    header = picture_header(str(path))
    window = _BYTE if header.is_8bit else _measured(str(path), 0, config.mr_percentiles)
    single = StudyFrame(str(path), 0, (0, 0, 0), (window,) * 3)
    return PlannedStudy("", *_tiled(single, header.height, header.width, config, size))


def plan_video(
    source: str | Path | Sequence[str | Path], config: FramesConfig, choice: FrameChoice | None = None
) -> PlannedStudy:
    """The frames of a film.

    Args:
        source: paths of its pictures in order, or one path: a folder of pictures (shown in the order of their names),
            a GIF, a TIFF of several pages, an array [T, H, W] or uint8 [T, H, W, 3], or a film, which needs PyAV.
        config: how it is shown.
        choice: which pictures; the configuration's where left out.

    Raises:
        UserError: a file or folder cannot be read, or the choice leaves nothing.
    """
    pages, times = _pages(source)
    chosen = choice_of(choice, config.choice)
    if chosen.range_mm is not None:
        raise UserError("frames.range_mm: a film has no positions in mm; leave the range out")
    left = within(times, chosen.range_s, len(pages), "frames.range_s")
    left = thin(left, chosen.every, chosen.at_most)
    first, page = pages[left[0]]
    window = _measured(first, page, config.mr_percentiles)
    frames = [StudyFrame(pages[i][0], pages[i][1], (0, 0, 0), (window,) * 3) for i in left]
    labels = [f"picture {i + 1}" if times is None else f"t={times[i]:.1f} s" for i in left]
    return PlannedStudy(f"film, {_count(len(left), len(pages), 'pictures')}", frames, labels)


def _pages(source: str | Path | Sequence[str | Path]) -> tuple[list[tuple[str, int]], list[float] | None]:
    """File and page of each picture of a film, and when it is shown."""
    if not isinstance(source, str | Path):
        paths = [str(path) for path in source]
        if not paths:
            raise UserError("videos: a film has no pictures; give the paths of its pictures")
        return [(path, 0) for path in paths], None
    path = str(source)
    if Path(path).is_dir():
        names = sorted(entry.name for entry in Path(path).iterdir() if entry.suffix.lower() in PICTURES)
        if not names:
            raise UserError(f"{path} has no pictures ({', '.join(PICTURES)}); give another folder")
        return [(str(Path(path) / name), 0) for name in names], None
    if is_film(path):
        film = film_header(path)
        return [(path, i) for i in range(film.num_frames)], [i / film.rate for i in range(film.num_frames)]
    if path.endswith(ARRAY):
        return [(path, i) for i in range(ArrayFile(path).shape[0])], None
    num_pages = picture_header(path).pages
    return [(path, i) for i in range(num_pages)], page_times(path, num_pages)


@lru_cache(maxsize=4096)
def _measured(path: str, page: int, bounds: tuple[float, float]) -> Window:
    """The window of a picture's file: all of 8 bits, percentiles of what has more."""
    if is_film(path):
        return _BYTE
    if path.endswith(ARRAY):
        array = ArrayFile(path)
        if array.dtype == np.uint8:
            return _BYTE
        values = array.read(page, 0)
    elif picture_header(path).is_8bit:
        return _BYTE
    else:
        values = read_picture(path, page)
    found = percentiles(values.reshape(-1)[:: -(-values.size // _LOOKED_AT)])
    return _span(found[str(bounds[0])], found[str(bounds[1])])


def _tiled(
    whole: StudyFrame, height: int, width: int, config: FramesConfig, size: int
) -> tuple[list[StudyFrame], list[str]]:
    whole = replace(whole, fit="stretch")
    columns, rows = tile_grid(height, width, size, config.min_tiles, config.max_tiles)
    if columns * rows == 1:
        return [whole], [""]
    frames = [replace(whole, box=box) for box in tile_boxes(height, width, columns, rows)]
    labels = [f"tile {row + 1},{column + 1}" for row in range(rows) for column in range(columns)]
    return (frames + [whole], [*labels, "whole"]) if config.thumbnail else (frames, labels)


def _is_ct(info: SeriesInfo) -> bool:
    return info.modality == "CT" and info.units == "HU"


def _windows(info: SeriesInfo, ref: StudyRef, config: FramesConfig) -> tuple[tuple[Window, Window, Window], str]:
    """The three channels' windows, and what is said of them."""
    if ref.windows is not None:
        if not _is_ct(info) and any(isinstance(name, str) for name in ref.windows):
            raise UserError(f"studies.windows: windows by name are for CT in HU, and a series of {info.modality} is to "
                            "be shown; give [centre, width] in its units, or leave windows out")
        named, key = tuple(ref.windows), "studies.windows"
    elif _is_ct(info):
        is_head = info.body_part in _HEADS
        named, key = (config.ct_head_windows, "data.frames.ct_head_windows") if is_head else (
            config.ct_windows, "data.frames.ct_windows")
    else:
        return (_own_window(info, config),) * 3, ""
    windows = three_windows(named, key)
    if _is_ct(info) and config.ct_channels == "adjacent":
        return (windows[0],) * 3, f"window {_words(named[:1])}, neighbouring slices as channels"
    return windows, f"windows {_words(named)}" if _is_ct(info) else ""


def _words(named: Sequence[str | tuple[float, float]]) -> str:
    return "/".join(name.replace("_", " ") if isinstance(name, str) else f"{name[0]:g}±{name[1] / 2:g}"
                    for name in named)


def _own_window(info: SeriesInfo, config: FramesConfig) -> Window:
    """Of a series whose values have no scale that all share."""
    is_colour = len(info.shape) == 5
    if is_colour or (info.dtype == "uint8" and info.kind == "image"):
        return _BYTE
    if info.kind == "image" and info.windows:
        centre, width = info.windows[0]
        return _span(centre - width / 2, centre + width / 2)
    low, high = (info.percentiles.get(str(percent)) for percent in config.mr_percentiles)
    if low is None or high is None:
        raise UserError("a series has no percentiles beside its voxels; ingest it again")
    return _span(0.0 if info.modality in _FROM_ZERO else low, high)


def _span(low: float, high: float) -> Window:
    """A window that is never empty: of a picture of one value it is 1 wide."""
    return (low, high) if high > low else (low, low + 1)


def _slices(info: SeriesInfo, choice: FrameChoice) -> tuple[list[_Item], str]:
    num_slices = info.shape[1]
    _no_times(choice)
    has_positions = info.kind != "image"
    positions = slice_positions(info) if has_positions else None
    left = thin(within(positions, choice.range_mm, num_slices, "frames.range_mm"), choice.every, choice.at_most)
    items = [_Item(0, i, f"picture {i + 1}" if positions is None else f"z={positions[i]:.1f} mm") for i in left]
    return items, _count(len(left), num_slices, "slices" if has_positions else "pictures")


def _volumes(info: SeriesInfo, choice: FrameChoice, index: int) -> tuple[list[_Item], str]:
    """One frame a volume."""
    if choice.range_mm is not None:
        raise UserError("frames.range_mm: a run is shown as mosaics of all slices; set data.frames.run to 'slices', or "
                        "leave the range out")
    num_volumes = info.shape[0]
    left = within(volume_times(info), choice.range_s, num_volumes, "frames.range_s")
    left = thin(left, choice.every, choice.at_most)
    items = [_Item(t, index, label) for t, label in zip(left, _volume_labels(info, left), strict=True)]
    return items, _count(len(left), num_volumes, f"{_NAMES_IN_TIME[info.kind]}s")


def _slices_in_time(info: SeriesInfo, choice: FrameChoice) -> tuple[list[_Item], str]:
    """Slices of volumes. `every` is of volumes, and so is `at_most` while it is as many as a volume has slices."""
    num_volumes, num_slices = info.shape[:2]
    if num_slices == 1:
        return _volumes(info, choice, 0)
    positions = None if info.kind == "image" else slice_positions(info)
    slices = within(positions, choice.range_mm, num_slices, "frames.range_mm")
    at_most = None
    if choice.at_most is not None:
        at_most, slices = max(1, choice.at_most // len(slices)), thin(slices, 1, choice.at_most)
    volumes = within(volume_times(info), choice.range_s, num_volumes, "frames.range_s")
    volumes = thin(volumes, choice.every, at_most)
    items = []
    for t, when in zip(volumes, _volume_labels(info, volumes), strict=True):
        items += [_Item(t, s, f"{when} " + (f"z={positions[s]:.1f} mm" if positions else f"slice {s + 1}"))
                  for s in slices]
    shown = f"{_count(len(volumes), num_volumes, 'volumes')}, {_count(len(slices), num_slices, 'slices')} each"
    return items, shown


def _volume_labels(info: SeriesInfo, volumes: Sequence[int]) -> list[str]:
    times = volume_times(info)
    if times is not None:
        return [f"t={times[t]:.1f} s" for t in volumes]
    if len(info.b_values) == info.shape[0]:
        return [f"b={info.b_values[t]:.0f} s/mm2" for t in volumes]
    return [f"{_NAMES_IN_TIME[info.kind]} {t + 1}" for t in volumes]


def _plan_parcels(
    info: SeriesInfo, voxels_path: str | Path, choice: FrameChoice, config: FramesConfig, cache: str | Path | None
) -> PlannedStudy:
    if cache is None:
        raise ValueError("data.frames.run=parcels needs a folder to keep carpets in")
    if choice.range_mm is not None:
        raise UserError("frames.range_mm: parcels have no positions; leave the range out")
    path, num_parcels = carpet(info, Path(voxels_path), Path(config.atlas), Path(cache))
    times = volume_times(info)
    left = within(times, choice.range_s, info.shape[0], "frames.range_s")
    width = min(config.parcel_volumes, len(left))
    # The last block is as wide as the others, so that a pixel always is as long: it may show some volumes again.
    starts = [*range(left[0], left[-1] + 2 - width, width)]
    if starts[-1] + width <= left[-1]:
        starts.append(left[-1] + 1 - width)
    chosen = thin(starts, choice.every, choice.at_most)
    scale: Window = (-config.parcel_percent, config.parcel_percent)
    frames = [StudyFrame(str(path), 0, (0, 0, 0), (scale,) * 3, (0.0, float(start), float(num_parcels), float(width)),
                         "stretch") for start in chosen]
    labels = [f"volumes {start + 1}-{start + width}" if times is None
              else f"t={times[start]:.1f}-{times[start + width - 1]:.1f} s" for start in chosen]
    shown = f"{num_parcels} parcels in time, {_count(len(chosen), len(starts), 'blocks')} of {width} volumes"
    header = _header(info, shown, f"black to white is ±{config.parcel_percent:g}% signal change")
    return PlannedStudy(header, frames, labels)


def _no_times(choice: FrameChoice) -> None:
    if choice.range_s is not None:
        raise UserError("frames.range_s: a series without time is to be shown; leave the range out")


def _count(shown: int, there: int, what: str) -> str:
    if there == 1:
        what = what.removesuffix("s")
    return f"{there} {what}" if shown == there else f"{shown} of {there} {what}"


def _gaps(info: SeriesInfo) -> str:
    """How far slices lie apart; empty where that is not known."""
    gaps = np.diff(slice_positions(info))
    if not gaps.any():
        return ""
    low, high = f"{gaps.min():.1f}", f"{gaps.max():.1f}"
    return f"{low} mm apart" if low == high else f"{low} to {high} mm apart"


def _header(info: SeriesInfo, shown: str, windows: str) -> str:
    """One line of what is known of a series; what is not known is left out."""
    is_spatial = info.kind != "image"
    width_mm, height_mm, _ = info.spacing_mm
    parts = [
        info.modality if info.modality != "OT" else "",
        info.body_part.replace("_", " ").lower(),
        {"L": "left", "R": "right", "B": "both sides"}.get(info.laterality, ""),
        info.view_position,
        info.plane if info.plane != "none" else "",
        info.part,
        "with contrast agent" if info.contrast else "",
        shown,
        _gaps(info) if is_spatial else "",
        f"pixels of {height_mm:.2f} x {width_mm:.2f} mm" if is_spatial else "",
        f"TR {info.repetition_time_s:g} s" if info.repetition_time_s else "",
        f"TE {info.echo_time_ms:g} ms" if info.echo_time_ms else "",
        windows,
    ]
    return ", ".join(part for part in parts if part)
