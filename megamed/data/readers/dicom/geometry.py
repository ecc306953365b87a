"""Where slices lie: sorted along their normal, as a grid with an affine, with what is unusual about it.

Positions are ImagePositionPatient (PS3.3, C.7.6.2.1.1); names, instance numbers and the spacings that headers state
play no part, but for the extent of a single slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megamed.data.readers.base import FileHeader, Refusal
from megamed.data.readers.dicom.facts import Facts, Frame

# Two positions along the normal closer than this are one: above the rounding of headers, below any spacing of slices.
SAME_PLACE_MM = 0.05

# `SeriesInfo.slice_positions_mm` is for stacks that an affine misses by more.
_REGULAR_MM = 0.1

# A gap is a multiple of another if it is within this part of it; missing slices are told from irregular ones so.
_MULTIPLE = 0.1

# Below this, a difference between the stack's direction and the normal is rounding.
_TILT_DEG = 0.1

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Item(NamedTuple):
    """A slice with the file it is of."""

    header: FileHeader
    facts: Facts
    frame: Frame


@dataclass(frozen=True)
class Place:
    """Where slices were taken, one or, in a run, one a volume: its distance along the normal in mm."""

    distance_mm: float
    items: list[Item]


@dataclass(frozen=True)
class Stack:
    """The geometry of sorted places.

    Attributes:
        affine: (column, row, slice) to mm in RAS; the first and the last slice lie where they were.
        spacing_mm: between columns, rows and, along the normal, slices (median); 0 for an unknown extent.
        positions_mm: of the slices along the normal from the first, None where they are regular.
        tilt_deg: between the direction of the stack and the normal.
        notes: what is unusual.
    """

    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    positions_mm: tuple[float, ...] | None
    tilt_deg: float
    notes: tuple[str, ...]


def find_places(items: Sequence[Item]) -> list[Place]:
    """Places of slices of one orientation, sorted along their normal."""
    normal = _normal(items)
    along = sorted(
        ((float(normal @ np.array(item.frame.position)), i) for i, item in enumerate(items)),
    )
    places: list[Place] = []
    for distance, i in along:
        if not places or distance - places[-1].distance_mm > SAME_PLACE_MM:
            places.append(Place(distance, []))
        places[-1].items.append(items[i])
    return places


def measure(places: Sequence[Place]) -> Stack:
    """The geometry of a stack.

    Raises:
        Refusal: slices are shifted against each other, so that no grid holds them.
    """
    items = [item for place in places for item in place.items]
    normal = _normal(items)
    rows, columns = _axes(items)
    row_spacing, column_spacing = (float(value) for value in np.median([i.frame.spacing for i in items], axis=0))
    positions = np.array([np.mean([item.frame.position for item in place.items], axis=0) for place in places])
    distances = positions @ normal
    _check_line(places, positions, distances, min(row_spacing, column_spacing))
    notes: list[str] = []
    at: tuple[float, ...] | None = None
    tilt = 0.0
    if len(places) == 1:
        gap = float(np.median([item.frame.thickness for item in items]))
        step = normal * (gap or 1.0)
    else:
        gaps = np.diff(distances)
        gap = float(np.median(gaps))
        step = (positions[-1] - positions[0]) / (len(places) - 1)
        even = distances[0] + np.arange(len(places)) * float(step @ normal)
        if np.abs(distances - even).max() > _REGULAR_MM:
            at = tuple(round(float(d), 4) for d in distances - distances[0])
            notes.append(_irregularity(gaps))
        tilt = float(np.degrees(np.arccos(min(1.0, float(step @ normal) / float(np.linalg.norm(step))))))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = rows * column_spacing, columns * row_spacing, step
    affine[:3, 3] = positions[0]
    return Stack(
        affine=_LPS_TO_RAS @ affine,
        spacing_mm=(round(column_spacing, 6), round(row_spacing, 6), round(gap, 4)),
        positions_mm=at,
        tilt_deg=round(tilt, 2) if tilt > _TILT_DEG else 0.0,
        notes=tuple(notes),
    )


def is_regular(places: Sequence[Place]) -> bool:
    """Whether the distances between places are the same throughout."""
    distances = np.array([place.distance_mm for place in places])
    even = np.linspace(distances[0], distances[-1], len(places))
    return bool(np.abs(distances - even).max() <= _REGULAR_MM)


def _axes(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors along a row and along a column, LPS: the mean of what headers round in their own ways."""
    mean = np.mean([item.frame.orientation for item in items], axis=0)
    return mean[:3] / np.linalg.norm(mean[:3]), mean[3:] / np.linalg.norm(mean[3:])


def _normal(items: Sequence[Item]) -> np.ndarray:
    normal = np.cross(*_axes(items))
    return normal / np.linalg.norm(normal)


def _check_line(places: Sequence[Place], positions: np.ndarray, distances: np.ndarray, pixel_mm: float) -> None:
    """First pixels lie on a line, straight or slanted, to half a pixel."""
    span = distances[-1] - distances[0]
    direction = (positions[-1] - positions[0]) / span if span else np.zeros(3)
    for place, distance in zip(places, distances, strict=True):
        expected = positions[0] + direction * (distance - distances[0])
        off = np.array([item.frame.position for item in place.items]) - expected
        if np.linalg.norm(off, axis=1).max() > pixel_mm / 2:
            raise Refusal(
                "not-a-stack", "slices are shifted against each other within their plane",
                "export the stacks of the series one by one",
            )


def _irregularity(gaps: np.ndarray) -> str:
    for unit in (float(np.median(gaps)), float(gaps.min())):
        multiples = gaps / unit
        if np.abs(multiples - np.rint(multiples)).max() <= _MULTIPLE and multiples.min() > 0.5:
            missing = int((np.rint(multiples) - 1).sum())
            return "1 slice is missing" if missing == 1 else f"{missing} slices are missing"
    return f"slices lie {gaps.min():.2f} to {gaps.max():.2f} mm apart"
