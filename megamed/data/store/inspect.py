"""What is in a store: a table for the terminal, and a contact sheet to look at. Neither holds an identity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megamed.data.series import SeriesInfo
from megamed.data.store.record import SeriesRecord
from megamed.data.store.volume_store import VolumeStore

_GROUP = ("modality", "body_part", "plane", "kind")

# Of a contact sheet, in pixels.
_CELL, _MARGIN, _LINE, _COLUMNS = 192, 8, 15, 6


def describe(store: VolumeStore, series: bool = False) -> str:
    """A table of what a store holds: one row for each modality, body part, plane and kind.

    Args:
        store: to describe.
        series: one row for each series instead.
    """
    rows, num_words = (_series_rows(store), 5) if series else (_group_rows(store), len(_GROUP))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        # Words stand at the left of their column, numbers at the right.
        "  ".join(cell.ljust(width) if i < num_words else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def contact_sheet(store: VolumeStore, path_png: str | Path, max_series: int = 48) -> int:
    """Draw a PNG with the middle slice of each series, through the header's first window or from percentile 1 to 99.

    Series are taken in the order of their names, which is as good as a draw.

    Args:
        store: to draw.
        path_png: is overwritten.
        max_series: so many at most.

    Returns:
        How many series were drawn.

    Raises:
        UserError: the folder of a series is damaged.
    """
    records = list(islice(store.records(), max_series))
    columns = max(min(_COLUMNS, len(records)), 1)
    height = _CELL + 2 * _LINE + _MARGIN
    num_rows = max(-(-len(records) // columns), 1)
    sheet = Image.new("RGB", (columns * (_CELL + _MARGIN) + _MARGIN, num_rows * height + _MARGIN), (24, 24, 24))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, record in enumerate(records):
        left, top = _MARGIN + i % columns * (_CELL + _MARGIN), _MARGIN + i // columns * height
        picture = _thumbnail(record)
        sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
        info = record.info
        words = [record.series[:8], info.modality, info.body_part, info.plane if info.plane != "none" else ""]
        for line, text in enumerate([" ".join(word for word in words if word), _shape_text(info.shape)]):
            draw.text((left, top + _CELL + line * _LINE), text, (220, 220, 220), font)
    sheet.save(path_png, format="PNG")
    return len(records)


def _thumbnail(record: SeriesRecord) -> Image.Image:
    """The middle slice of the middle volume, as wide and high as it is in mm, in a square of `_CELL` pixels."""
    info, voxels = record.info, record.open()
    picture = np.asarray(voxels[voxels.shape[0] // 2, voxels.shape[1] // 2])
    if picture.ndim == 2:
        low, high = _window(record.info, picture)
        scaled = (picture.astype(np.float64) - low) / max(high - low, 1e-9)
        picture = np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    width, height = picture.shape[1] * info.spacing_mm[0], picture.shape[0] * info.spacing_mm[1]
    scale = _CELL / max(width, height)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR).convert("RGB")


def _window(info: SeriesInfo, picture: np.ndarray) -> tuple[float, float]:
    if info.windows:
        centre, width = info.windows[0]
        return centre - width / 2, centre + width / 2
    if info.percentiles:
        return info.percentiles["1.0"], info.percentiles["99.0"]
    return float(picture.min()), float(picture.max())


def _group_rows(store: VolumeStore) -> list[list[str]]:
    columns = (*_GROUP, "study", "num_slices", "spacing_w_mm", "spacing_s_mm", "num_bytes")
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in store.index.table.select(columns).to_pylist():
        groups.setdefault(tuple(row[name] or "-" for name in _GROUP), []).append(row)
    rows = [["modality", "body part", "plane", "kind", "series", "studies", "slices", "mm in plane", "mm between",
             "GB"]]
    everything = [row for group in groups.values() for row in group]
    for key, group in [*sorted(groups.items()), (("all", "", "", ""), everything)]:
        in_space = [row for row in group if row["kind"] != "image"]
        rows.append([
            *key, str(len(group)), str(len({row["study"] for row in group} - {""})),
            _range([row["num_slices"] for row in in_space]), _range([row["spacing_w_mm"] for row in in_space]),
            _range([row["spacing_s_mm"] for row in in_space]), _gigabytes(sum(row["num_bytes"] for row in group)),
        ])
    return rows


def _series_rows(store: VolumeStore) -> list[list[str]]:
    rows = [["series", "modality", "body part", "plane", "kind", "T x S x H x W", "mm (W x H x S)", "dtype", "units",
             "GB", "keywords"]]
    for record in store.records():
        info = record.info
        rows.append([
            record.series, info.modality, info.body_part or "-", info.plane, info.kind, _shape_text(info.shape),
            "-" if info.kind == "image" else _shape_text([f"{length:.3g}" for length in info.spacing_mm]),
            info.dtype, info.units, _gigabytes(record.num_bytes), ", ".join(info.keywords) or "-",
        ])
    return rows


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g}"


def _shape_text(shape: Sequence[object]) -> str:
    return " x ".join(map(str, shape))
