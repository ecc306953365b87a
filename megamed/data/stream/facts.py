"""Questions whose answers follow from what the store knows of a series and from which of its slices are shown.

Nothing here looks at a pixel, and nothing is anybody's opinion: the answers are true by construction. So a store
without reports can be trained on, and any store can be asked about what training never showed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megamed.data.batch import QA
from megamed.data.frames import MOSAIC, StudyFrame
from megamed.data.frames.choice import slice_positions
from megamed.data.series import SeriesInfo

Judge = Callable[[str], bool]

# DICOM's codes of modalities that have a common name.
_MODALITIES = {
    "CT": "CT", "MR": "MR", "PT": "PET", "CR": "X-ray", "DX": "X-ray", "XR": "X-ray", "MG": "mammography",
    "US": "ultrasound",
}
# Where a stack begins and where it ends, in the orientation that the store keeps.
_ENDS = {"axial": ("feet", "head"), "coronal": ("front", "back"), "sagittal": ("right", "left")}

# Two slices further apart than the others by this many millimetres are no even spacing.
_EVEN_MM = 0.05

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_WORD = re.compile(r"[a-z-]+")


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and whether an answer in a model's words is right."""

    qa: QA
    judge: Judge


@dataclass(frozen=True)
class _Stack:
    """What is shown of a series.

    Attributes:
        info: the series.
        positions_mm: of the slices shown, along the stack; empty where frames are no slices of one.
        num_frames: shown.
    """

    info: SeriesInfo
    positions_mm: tuple[float, ...]
    num_frames: int


def facts_of(info: SeriesInfo, frames: Sequence[StudyFrame], rng: np.random.Generator) -> list[Asked]:
    """All questions that make sense of some frames of a series, one of each kind.

    Args:
        info: the series.
        frames: shown, in their order.
        rng: draws phrasings, and which slices are asked about.
    """
    slices = [frame.slices[1] for frame in frames]
    is_stack = info.kind == "volume" and MOSAIC not in slices and all(frame.box is None for frame in frames)
    positions = slice_positions(info)
    stack = _Stack(info, tuple(positions[s] for s in slices) if is_stack else (), len(frames))
    return [asked for kind in _KINDS if (asked := kind(stack, rng)) is not None]


def _modality(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    name = _MODALITIES.get(stack.info.modality)
    if name is None:
        return None
    phrasings = ("What kind of imaging is this?", "Which modality is shown?", "Modality?")
    return _ask(rng, "modality", phrasings, name, _says(name, set(_MODALITIES.values())))


def _plane(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    if stack.info.plane == "none":
        return None
    phrasings = ("In which plane are the slices?", "Are these slices axial, coronal or sagittal?", "Plane?")
    return _ask(rng, "plane", phrasings, stack.info.plane, _says(stack.info.plane, set(_ENDS)))


def _number(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    if not stack.positions_mm:
        return None
    phrasings = ("How many slices are shown?", "Number of slices?", "How many slices do you see?")
    return _ask(rng, "num_slices", phrasings, str(stack.num_frames), _counts(stack.num_frames))


def _spacing(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    gaps = np.abs(np.diff(stack.positions_mm))
    if not len(gaps) or gaps.max() - gaps.min() > _EVEN_MM or gaps.min() == 0:
        return None
    gap = float(gaps.mean())
    phrasings = ("How far apart are the slices shown?", "What is the distance between neighbouring slices?", "Spacing?")
    return _ask(rng, "spacing", phrasings, f"{gap:.1f} mm", _measures(gap, 0.051))  # what the answer is rounded to


def _body_part(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    part = stack.info.body_part.lower()
    phrasings = ("Which part of the body is this?", "What does the scan show?", "Body part?")
    return _ask(rng, "body_part", phrasings, part, lambda answer: part in answer.lower()) if part else None


def _order(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    ends = _ENDS.get(stack.info.plane)
    if ends is None or len(set(stack.positions_mm)) < 2:
        return None
    a, b = (int(n) for n in rng.choice(stack.num_frames, 2, replace=False))
    if stack.positions_mm[a] == stack.positions_mm[b]:
        return None
    end = int(rng.integers(2))
    nearer = a if (stack.positions_mm[a] > stack.positions_mm[b]) == bool(end) else b
    phrasings = (
        f"Which is closer to the {ends[end]}, slice {a + 1} or slice {b + 1}?",
        f"Of slices {a + 1} and {b + 1}, which lies further towards the {ends[end]}?",
    )
    return _ask(rng, "order", phrasings, str(nearer + 1), _counts(nearer + 1))


def _extreme(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    ends = _ENDS.get(stack.info.plane)
    if ends is None or len(set(stack.positions_mm)) < max(2, len(stack.positions_mm)):
        return None
    end = int(rng.integers(2))
    number = int(np.argmax(stack.positions_mm) if end else np.argmin(stack.positions_mm)) + 1
    phrasings = (f"Which slice is closest to the {ends[end]}?", f"Slice nearest to the {ends[end]}?")
    return _ask(rng, "extreme", phrasings, str(number), _counts(number))


def _half(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    ends = _ENDS.get(stack.info.plane)
    if ends is None or not stack.positions_mm:
        return None
    middle = slice_positions(stack.info)[-1] / 2
    if max(stack.positions_mm) < middle:
        end = 0
    elif min(stack.positions_mm) > middle:
        end = 1
    else:
        return None
    phrasings = (
        f"Which half of the scan is shown, that towards the {ends[0]} or that towards the {ends[1]}?",
        f"Is this the half towards the {ends[1]} or towards the {ends[0]}?",
    )
    return _ask(rng, "half", phrasings, ends[end], _says(ends[end], set(ends)))


def _contrast(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    if stack.info.contrast is None:
        return None
    answer = "yes" if stack.info.contrast else "no"
    phrasings = ("Was a contrast agent given?", "Is this with contrast?", "Contrast?")
    return _ask(rng, "contrast", phrasings, answer, _says(answer, {"yes", "no"}))


def _view(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    view = stack.info.view_position
    if not view:
        return None
    phrasings = ("Which view is this?", "What is the view position?", "View?")
    return _ask(rng, "view", phrasings, view, _says(view, {view, "PA", "AP", "LL", "RL", "MLO", "CC"}))


def _repetition_time(stack: _Stack, rng: np.random.Generator) -> Asked | None:
    seconds = stack.info.repetition_time_s
    if stack.info.kind != "run" or not seconds:
        return None
    phrasings = ("What is the TR of this run?", "How many seconds from one volume to the next?", "TR?")
    return _ask(rng, "repetition_time", phrasings, f"{seconds:.2f} s", _measures(seconds, 0.0051))


_KINDS: tuple[Callable[[_Stack, np.random.Generator], Asked | None], ...] = (
    _modality, _plane, _number, _spacing, _body_part, _order, _extreme, _half, _contrast, _view, _repetition_time,
)


def _ask(rng: np.random.Generator, name: str, phrasings: Sequence[str], answer: str, judge: Judge) -> Asked:
    return Asked(QA(name, phrasings[int(rng.integers(len(phrasings)))], answer), judge)


def _says(wanted: str, words: set[str]) -> Judge:
    """The first of some words in the answer is the right one."""
    known = {word.lower() for word in words}
    return lambda answer: next((w for w in _WORD.findall(answer.lower()) if w in known), "") == wanted.lower()


def _counts(wanted: int) -> Judge:
    """The first number of the answer is the right one, and whole."""
    return lambda answer: next(iter(_NUMBER.findall(answer)), "") == str(wanted)


def _measures(wanted: float, tolerance: float) -> Judge:
    """The first number of the answer is the right one within a tolerance."""
    return lambda answer: math.isclose(float(next(iter(_NUMBER.findall(answer)), "nan")), wanted, abs_tol=tolerance)
