"""Which frames of a series, a run or a film are shown.

In this order: the range in mm or seconds, every n-th of what is left, at most so many of those.
"""

from __future__ import annotations

from collections.abc import Sequence

from megamed.data.frames.config import ChoiceConfig
from megamed.data.samples.schema import FrameChoice
from megamed.data.series import SeriesInfo
from megamed.utils import UserError

# Bounds of a range are as people write them, in decimals.
_ROUNDING = 1e-6


def choice_of(choice: FrameChoice | None, default: ChoiceConfig) -> FrameChoice:
    """A sample's choice; the configuration's where it has none."""
    return FrameChoice(every=default.every, at_most=default.at_most) if choice is None else choice


def slice_positions(info: SeriesInfo) -> list[float]:
    """Where each slice of a series lies along its stack, mm, the first at 0."""
    if info.slice_positions_mm is not None:
        return list(info.slice_positions_mm)
    return [index * info.spacing_mm[2] for index in range(info.shape[1])]


def volume_times(info: SeriesInfo) -> list[float] | None:
    """When each volume of a run begins, seconds, the first at 0; None where the header does not say."""
    if info.repetition_time_s is None:
        return None
    return [index * info.repetition_time_s for index in range(info.shape[0])]


def within(values: Sequence[float] | None, bounds: tuple[float, float] | None, count: int, key: str) -> list[int]:
    """Indices of the values inside a range, its ends included.

    Args:
        values: positions or times; None where they are not known.
        bounds: from and to; None is all.
        count: of the values.
        key: of the range, for messages; its end names the unit.

    Raises:
        UserError: there is a range and no values, or none lies in it.
    """
    if bounds is None:
        return list(range(count))
    if values is None:
        raise UserError(f"{key}: what is shown has no such positions; leave the range out")
    low, high = bounds
    found = [i for i, value in enumerate(values) if low - _ROUNDING <= value <= high + _ROUNDING]
    if not found:
        raise UserError(f"{key}: nothing lies from {low:g} to {high:g}; give a range between {min(values):g} and "
                        f"{max(values):g}")
    return found


def thin(indices: Sequence[int], every: int = 1, at_most: int | None = None) -> list[int]:
    """Every n-th of some indices, and at most so many of those: evenly, the ends included; of one, the middle.

    Raises:
        UserError: `every` or `at_most` is below 1.
    """
    if every < 1 or (at_most is not None and at_most < 1):
        raise UserError(f"frames: every is {every} and at_most is {at_most}; give whole numbers from 1 on")
    left = list(indices[::every])
    if at_most is None or len(left) <= at_most:
        return left
    if at_most == 1:
        return [left[len(left) // 2]]
    # Halves up, in whole numbers; steps are 1 at least, so none comes twice.
    gaps, last = at_most - 1, len(left) - 1
    return [left[(2 * i * last + gaps) // (2 * gaps)] for i in range(at_most)]
