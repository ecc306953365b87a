"""The DICOM reader: files to series, series to voxels.

Shape suffixes as in `megamed.data.series`: T volumes, S slices, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamed.data.orientation import find_turn
from megamed.data.privacy import Pseudonyms
from megamed.data.readers.base import FileHeader, Grouping, Refusal, SeriesPlan
from megamed.data.readers.dicom import pixels, values
from megamed.data.readers.dicom.facts import Facts, Frame
from megamed.data.readers.dicom.geometry import Item
from megamed.data.readers.dicom.group import Part, group, parts_of
from megamed.data.readers.dicom.header import read_header
from megamed.data.readers.dicom.parse import looks_like_dicom
from megamed.data.readers.dicom.volumes import repetition_time
from megamed.data.series import Series, SeriesInfo
from megamed.data.voxels import percentiles, to_smallest

# Volume, slice, and what lies there.
_Placed = tuple[int, int, Item]


@dataclass(frozen=True)
class DicomReader:
    """A `Reader` of CT, MR, PET, nuclear medicine, projection X-ray and photographs in DICOM."""

    name: str = "dicom"

    def can_read(self, path: Path, head: bytes) -> bool:
        """See `Reader`."""
        return looks_like_dicom(head)

    def metadata(self, path: Path, pseudonyms: Pseudonyms) -> FileHeader:
        """See `Reader`. Besides `Refusal`, an OSError where the file cannot be read."""
        return read_header(path, pseudonyms, self.name)

    def group(self, headers: Sequence[FileHeader]) -> Grouping:
        """See `Reader`. A file whose frames make several parts is in the plan of each."""
        return group(headers, self.name)

    def read(self, plan: SeriesPlan) -> Series:
        """See `Reader`. `SeriesInfo.provenance` is left empty."""
        files = [(header, Facts.of(header)) for header in plan.headers]
        if files[0][1].kind != "stack":
            return _read_picture(plan, *files[0])
        parts = parts_of(files)
        part = parts[0] if len(parts) == 1 else next((part for part in parts if part.name == plan.part), None)
        if part is None or part.refusal or part.stack is None:
            raise part.refusal if part and part.refusal else _not_the_plan()
        return _read_stack(plan, part)


def _not_the_plan() -> Refusal:
    return Refusal("changed", "the files do not make the series that was planned", "scan the folder again")


def _read_stack(plan: SeriesPlan, part: Part) -> Series:
    stack, first = part.stack, part.volumes[0][0]
    assert stack is not None
    facts = first.facts
    turn = find_turn(stack.affine, slice_axis=2)
    num_volumes, num_slices = len(part.volumes), len(part.volumes[0])
    if num_volumes * num_slices * facts.rows * facts.columns != plan.num_voxels:
        raise _not_the_plan()
    raw_shape = (facts.columns, facts.rows, num_slices)
    width, height = (raw_shape[axis] for axis in turn.axes[:2])
    canvas = values.Canvas((num_volumes, num_slices, height, width), turn)
    by_file: dict[int, list[_Placed]] = {}
    for t, volume in enumerate(part.volumes):
        for s, item in enumerate(volume):
            by_file.setdefault(id(item.header), []).append((t, s, item))
    for placed in by_file.values():
        _draw(canvas, placed)
    voxels_TSHW, notes = canvas.finish()
    row_mm, column_mm = (stack.spacing_mm[axis] for axis in turn.axes[:2])
    info = _info(plan, facts, first.frame, (*plan.notes, *notes), voxels_TSHW)
    info.kind, info.plane = "run" if num_volumes > 1 else "volume", turn.plane
    info.affine = tuple(tuple(row) for row in (turn.affine(stack.affine, raw_shape) + 0.0).tolist())
    info.spacing_mm = (row_mm, column_mm, stack.spacing_mm[2])
    info.slice_positions_mm = _turned_positions(stack.positions_mm, turn.flipped[2])
    info.gantry_tilt_deg = stack.tilt_deg
    if num_volumes > 1 or facts.grid:
        info.repetition_time_s, more = repetition_time(part.volumes)
        info.notes = (*info.notes, *more)
    b_value = first.frame.b_value
    # Philips writes b = 0 into every series: it says something beside other b-values alone.
    if b_value is not None and (b_value > 0 or f"b {b_value:g}" in plan.label):
        info.b_values = (b_value,) * num_volumes
    return Series(voxels_TSHW, info)


def _draw(canvas: values.Canvas, placed: list[_Placed]) -> None:
    """Decode one file, and put its slices where they belong."""
    header, facts = placed[0][2].header, placed[0][2].facts
    by_frame: dict[int, list[_Placed]] = {}
    for one in placed:
        by_frame.setdefault(one[2].frame.number, []).append(one)
    table = pixels.modality_table(header) if facts.lookup else None
    for number, stored_HW in pixels.frames(header, facts, set(by_frame)):
        for t, s, item in by_frame[number]:
            slice_HW = _tile(stored_HW, facts, item.frame.tile) if facts.grid else stored_HW
            canvas.put(t, s, *_values(slice_HW, facts, item.frame, table))


def _tile(mosaic_HW: np.ndarray, facts: Facts, tile: int) -> np.ndarray:
    top, left = tile // facts.grid * facts.rows, tile % facts.grid * facts.columns
    return mosaic_HW[top : top + facts.rows, left : left + facts.columns]


def _values(
    stored_HW: np.ndarray, facts: Facts, frame: Frame, table: tuple[int, np.ndarray] | None
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Values of stored numbers, and which of them are CT's padding."""
    if table is not None:
        result = values.look_up(stored_HW, *table)
    else:
        result = values.rescale(stored_HW, frame.slope, frame.intercept)
    if values.is_inverted(facts):
        total = values.inversion_sum(facts, frame, None if table is None else table[1])
        # In whole numbers where it can be, so that nothing is rounded.
        result = (int(total) if total == int(total) else np.float64(total)) - result.astype(
            np.int64 if result.dtype.kind in "iu" else np.float64
        )
        result = result if result.dtype.kind == "i" else result.astype(np.float32)
    if facts.modality != "CT" or not facts.padding or table is not None:
        return result, None
    low, high = sorted(frame.slope * end + frame.intercept for end in facts.padding)
    if facts.units == "HU" and high < values.VACUUM_HU:
        # Nothing real is there: lossy compression has made a range of the one value.
        return result, (-math.inf, (high + values.VACUUM_HU) / 2)
    return result, (low, high)


def _read_picture(plan: SeriesPlan, header: FileHeader, facts: Facts) -> Series:
    frame = facts.frames[0]
    _, stored = next(pixels.frames(header, facts, {0}))
    if facts.photometric == "PALETTE COLOR":
        stored = pixels.colours(stored, header)
    if stored.ndim == 3:
        voxels = np.ascontiguousarray(stored[None, None])
    else:
        table = pixels.modality_table(header) if facts.lookup else None
        voxels = to_smallest(_values(stored, facts, frame, table)[0][None, None])
    if voxels.size != plan.num_voxels:
        raise _not_the_plan()
    info = _info(plan, facts, frame, plan.notes, voxels)
    if values.is_inverted(facts):
        total = values.inversion_sum(facts, frame, table[1] if table is not None else None)
        info.inverted = True
        info.windows = tuple((total - centre, width) for centre, width in info.windows)
    if frame.spacing:
        info.spacing_mm = (frame.spacing[1], frame.spacing[0], 0.0)
    return Series(voxels, info)


def _info(plan: SeriesPlan, facts: Facts, frame: Frame, notes: tuple[str, ...], voxels: np.ndarray) -> SeriesInfo:
    """What both kinds of series have."""
    return SeriesInfo(
        modality=facts.modality,
        shape=tuple(int(size) for size in voxels.shape),
        dtype=voxels.dtype.name,
        units=facts.units,
        body_part=facts.body_part,
        keywords=tuple(facts.keywords),
        laterality=facts.laterality,
        view_position=facts.view,
        contrast=facts.contrast,
        echo_time_ms=frame.echo_ms,
        flip_angle_deg=facts.flip_deg if facts.modality == "MR" else None,
        field_strength_t=facts.field_t if facts.modality == "MR" else None,
        part=plan.label,
        windows=tuple((float(pair[0]), float(pair[1])) for pair in facts.windows),
        percentiles=percentiles(voxels) if voxels.ndim == 4 else {},
        notes=notes,
    )


def _turned_positions(positions_mm: tuple[float, ...] | None, flipped: bool) -> tuple[float, ...] | None:
    """Positions from the first slice of the turned stack."""
    if positions_mm is None or not flipped:
        return positions_mm
    return tuple(round(positions_mm[-1] - position, 4) for position in reversed(positions_mm))
