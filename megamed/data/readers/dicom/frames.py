"""The slices of a file: one, the tiles of a Siemens mosaic, or the frames of an enhanced object.

Where a slice lies is DICOM's Image Plane module (PS3.3, C.7.6.2), for enhanced objects the functional groups
(C.7.6.16), for nuclear medicine its detector (C.8.4.15), and for mosaics what Siemens writes into its CSA header.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from megamed.data.readers.base import Refusal
from megamed.data.readers.dicom import codes
from megamed.data.readers.dicom.csa import read_csa
from megamed.data.readers.dicom.elements import (
    item,
    number,
    numbers,
    private,
    private_number,
    seconds,
    text,
    whole,
    word,
    words,
)
from megamed.data.readers.dicom.facts import Facts, Frame

_CONVERT = "convert the series to NIfTI, for instance with dcm2niix"

# Words that differ from slice to slice of one stack: how it was written, not what it shows.
_NOT_TELLING = {"", "MOSAIC", "ADD", "NONE"}

# Dimensions that say where in a stack a frame lies (PS3.3, C.7.6.17).
_OF_PLACE = {
    tag_for_keyword(name) for name in ("StackID", "InStackPositionNumber", "ImagePositionPatient", "SliceLocation")
}

# What GE's scanners write in (0043,102F) instead of a word of ImageType.
_GE_KINDS = ("M", "P", "R", "I")

# Farther than this from the middle of a scanner nothing is imaged.
_FARTHEST_MM = 1e5

# GE adds multiples of this to b-values as a mark.
_GE_MARK = 100_000


def frames_of(facts: Facts, dataset: Dataset, sop_class: str, types: tuple[str, ...]) -> None:
    """Fill in `facts.frames`, and what belongs to it.

    Raises:
        Refusal: the header does not say where the slices lie.
    """
    if sop_class in codes.ENHANCED:
        facts.frames = list(_enhanced(facts, dataset, types))
    elif sop_class == codes.NM:
        facts.frames = _detector(facts, dataset)
    elif "MOSAIC" in types:
        facts.frames = _mosaic(facts, dataset, types)
    elif facts.num_frames > 1:
        raise Refusal("no-geometry", "several frames in an object that has a place for one", _CONVERT)
    else:
        facts.frames = [_single(facts, dataset, types)]
    for frame in facts.frames:
        _check_place(frame)


def _single(facts: Facts, dataset: Dataset, types: tuple[str, ...]) -> Frame:
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    return Frame(
        number=0,
        position=numbers(dataset, "ImagePositionPatient", 3),
        orientation=numbers(dataset, "ImageOrientationPatient", 6),
        spacing=numbers(dataset, "PixelSpacing", 2),
        thickness=_thickness(dataset),
        # A slope of 0 would make all values one: writers that leave it empty mean 1.
        slope=slope or 1.0,
        intercept=intercept or 0.0,
        echo_ms=_echo(facts, dataset),
        b_value=_b_value(facts, dataset),
        types=_telling(facts, dataset, types),
        temporal=whole(dataset, "TemporalPositionIdentifier"),
        acquisition=whole(dataset, "AcquisitionNumber"),
        acquired_s=_first_of(seconds(dataset, "AcquisitionTime"), seconds(dataset, "AcquisitionDateTime")),
        content_s=seconds(dataset, "ContentTime"),
        trigger_ms=number(dataset, "TriggerTime"),
        reference_ms=number(dataset, "FrameReferenceTime"),
        instance=whole(dataset, "InstanceNumber"),
    )


def _first_of(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _thickness(dataset: Dataset) -> float:
    return abs(number(dataset, "SpacingBetweenSlices") or number(dataset, "SliceThickness") or 0.0)


def _echo(facts: Facts, dataset: Dataset) -> float | None:
    value = number(dataset, "EchoTime") if facts.modality == "MR" else None
    return None if value is None else round(value, 3)


def _b_value(facts: Facts, dataset: Dataset) -> float | None:
    """From the standard's element, or what Siemens, GE and Philips wrote before there was one."""
    if facts.modality != "MR":
        return None
    siemens = private_number(private(dataset, 0x0019, "SIEMENS MR HEADER", 0x0C))
    value = _first_of(number(dataset, "DiffusionBValue"), siemens)
    if value is None:
        ge = private_number(private(dataset, 0x0043, "GEMS_PARM_01", 0x39))
        philips = private_number(private(dataset, 0x2001, "Philips Imaging DD 001", 0x03))
        # These two write a 0 into every series.
        value = (None if ge is None else ge % _GE_MARK) or philips or None
    return _rounded(value, 0)


def _telling(facts: Facts, dataset: Dataset, types: tuple[str, ...]) -> tuple[str, ...]:
    """Words of ImageType that must be the same throughout a stack."""
    if facts.modality != "MR":
        # Further values of CT say how a slice was reconstructed, which may change within a stack.
        return tuple(codes.known_word(one) for one in types[:3] if one not in _NOT_TELLING)
    ge = private_number(private(dataset, 0x0043, "GEMS_PARM_01", 0x2F))
    own = (_GE_KINDS[int(ge)],) if ge in (0, 1, 2, 3) else ()
    return (*(codes.known_word(one) for one in types if one not in _NOT_TELLING), *own)


def _check_place(frame: Frame) -> None:
    missing = [
        name
        for name, value in (
            ("position", frame.position), ("orientation", frame.orientation), ("pixel spacing", frame.spacing),
        )
        if not value
    ]
    if missing:
        raise Refusal("no-geometry", f"a slice without {' and '.join(missing)}", "export the series again")
    first, second = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    # Headers round cosines to a few digits; beyond a hundredth they mean nothing.
    lengths = (np.linalg.norm(first), np.linalg.norm(second))
    if any(abs(length - 1) > 1e-2 for length in lengths) or abs(first @ second) > 1e-2:
        raise Refusal("no-geometry", "a slice whose rows and columns are not at a right angle", "export it again")
    if any(value <= 0 for value in frame.spacing):
        raise Refusal("no-geometry", "a slice whose pixels have no size", "export the series again")
    if any(abs(value) > _FARTHEST_MM for value in (*frame.position, *frame.spacing)):
        raise Refusal("no-geometry", "a slice that lies nowhere near a patient", "export the series again")


@dataclass(frozen=True)
class _Groups:
    """Functional groups of one frame: its own before those that all share."""

    own: Dataset | None
    shared: Dataset | None

    def get(self, sequence: str) -> Dataset:
        """The first item of a functional group, empty where there is none."""
        return _first_of(item(self.own, sequence), item(self.shared, sequence), Dataset())


def _enhanced(facts: Facts, dataset: Dataset, types: tuple[str, ...]) -> Iterator[Frame]:
    shared = item(dataset, "SharedFunctionalGroupsSequence")
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(per_frame) != facts.num_frames:
        raise Refusal("no-geometry", f"{facts.num_frames} frames, but {len(per_frame)} of them described", _CONVERT)
    telling = _dimensions_that_tell(dataset)
    for n, own in enumerate(per_frame):
        groups = _Groups(own, shared)
        content = groups.get("FrameContentSequence")
        transform = groups.get("PixelValueTransformationSequence")
        measures = groups.get("PixelMeasuresSequence")
        slope, intercept = number(transform, "RescaleSlope"), number(transform, "RescaleIntercept")
        indices = numbers(content, "DimensionIndexValues")
        yield Frame(
            number=n,
            position=numbers(groups.get("PlanePositionSequence"), "ImagePositionPatient", 3),
            orientation=numbers(groups.get("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
            spacing=numbers(measures, "PixelSpacing", 2),
            thickness=_thickness(measures) or _thickness(dataset),
            slope=_first_of(slope, number(dataset, "RescaleSlope")) or 1.0,
            intercept=_first_of(intercept, number(dataset, "RescaleIntercept"), 0.0),
            echo_ms=_rounded(number(groups.get("MREchoSequence"), "EffectiveEchoTime"), 3),
            b_value=_rounded(number(groups.get("MRDiffusionSequence"), "DiffusionBValue"), 0),
            types=_frame_types(facts, groups) or _telling(facts, dataset, types),
            stack=codes.known_word(stack) if (stack := word(content, "StackID")) else "",
            temporal=whole(content, "TemporalPositionIndex"),
            dimensions=tuple(int(indices[i]) for i in telling if i < len(indices)),
            acquisition=whole(content, "FrameAcquisitionNumber"),
            acquired_s=_first_of(
                seconds(content, "FrameAcquisitionDateTime"), seconds(content, "FrameReferenceDateTime"),
            ),
            trigger_ms=number(groups.get("CardiacSynchronizationSequence"), "NominalCardiacTriggerDelayTime"),
            instance=whole(dataset, "InstanceNumber"),
        )
    _describe_enhanced(facts, _Groups(per_frame[0], shared), dataset)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else float(round(value, digits))


def _dimensions_that_tell(dataset: Dataset) -> list[int]:
    """Which of the dimension indices say something else than where a frame lies."""
    pointers = [text(one, "DimensionIndexPointer") for one in dataset.get("DimensionIndexSequence") or []]
    tags = [int(one.replace("(", "").replace(")", "").replace(",", ""), 16) if one else 0 for one in pointers]
    return [i for i, tag in enumerate(tags) if tag not in _OF_PLACE]


def _frame_types(facts: Facts, groups: _Groups) -> tuple[str, ...]:
    for name in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"):
        group = groups.get(name)
        types = words(group, "FrameType")
        if types:
            wanted = types if facts.modality == "MR" else types[:3]
            component = word(group, "ComplexImageComponent")
            return tuple(codes.known_word(one) for one in (*wanted, component) if one not in _NOT_TELLING)
    return ()


def _describe_enhanced(facts: Facts, groups: _Groups, dataset: Dataset) -> None:
    """What single-frame objects have at the top of their header."""
    window = groups.get("FrameVOILUTSequence")
    pairs = zip(numbers(window, "WindowCenter"), numbers(window, "WindowWidth"), strict=False)
    facts.windows = facts.windows or tuple(pair for pair in pairs if pair[1] > 0)
    timing = groups.get("MRTimingAndRelatedParametersSequence")
    facts.repetition_ms = _first_of(facts.repetition_ms, number(timing, "RepetitionTime"))
    facts.flip_deg = _first_of(facts.flip_deg, number(timing, "FlipAngle"))
    facts.laterality = facts.laterality or word(groups.get("FrameAnatomySequence"), "FrameLaterality", "LRB")
    units = codes.UNITS.get(word(groups.get("PixelValueTransformationSequence"), "RescaleType"), "a.u.")
    facts.units = units if facts.units == "a.u." else facts.units


def _mosaic(facts: Facts, dataset: Dataset, types: tuple[str, ...]) -> list[Frame]:
    """The tiles of a Siemens mosaic, in the order in which it counts them.

    ImagePositionPatient of a mosaic is where the first pixel would be if the whole mosaic were centred on the slice:
    half of what the mosaic is larger than a tile has to be added.
    """
    whole_picture = _single(facts, dataset, types)
    value = private(dataset, 0x0029, "SIEMENS CSA HEADER", 0x10)
    csa = read_csa(value) if isinstance(value, bytes) else {}
    count = private_number(private(dataset, 0x0019, "SIEMENS MR HEADER", 0x0A))
    count = count or _csa_number(*csa.get("NumberOfImagesInMosaic", [])[:1])
    if not count:
        raise Refusal("no-geometry", "a mosaic that does not say how many slices it has", _CONVERT)
    grid = math.ceil(math.sqrt(count))
    if facts.rows % grid or facts.columns % grid or facts.num_frames > 1 or not whole_picture.thickness:
        raise Refusal("no-geometry", f"a mosaic that does not divide into {grid} x {grid} tiles", _CONVERT)
    _check_place(whole_picture)
    first, second = np.array(whole_picture.orientation[:3]), np.array(whole_picture.orientation[3:])
    normal = np.cross(first, second)
    csa_normal = np.array([_csa_number(one) for one in csa.get("SliceNormalVector", [])], dtype=float)
    if csa_normal.shape == (3,):
        # Only its sense is taken: it has fewer digits than the orientation.
        if abs(abs(csa_normal @ normal) - 1) > 1e-2:
            raise Refusal("no-geometry", "a mosaic whose normal does not fit its orientation", _CONVERT)
        normal = normal if csa_normal @ normal > 0 else -normal
    rows, columns = facts.rows // grid, facts.columns // grid
    row_spacing, column_spacing = whole_picture.spacing
    corner = (
        np.array(whole_picture.position)
        + first * column_spacing * (facts.columns - columns) / 2
        + second * row_spacing * (facts.rows - rows) / 2
    )
    b_value = _first_of(whole_picture.b_value, _rounded(_csa_number(*csa.get("B_value", [])[:1]), 0))
    facts.rows, facts.columns, facts.grid = rows, columns, grid
    return [
        whole_picture._replace(
            tile=tile, position=tuple((corner + normal * whole_picture.thickness * tile).tolist()), b_value=b_value,
        )
        for tile in range(int(count))
    ]


def _csa_number(text: str = "") -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _detector(facts: Facts, dataset: Dataset) -> list[Frame]:
    """Reconstructed slices of nuclear medicine: the first one's place, and a distance whose sign is a direction."""
    detector = item(dataset, "DetectorInformationSequence") or dataset
    position = _first_of(
        numbers(detector, "ImagePositionPatient", 3) or None, numbers(dataset, "ImagePositionPatient", 3) or None, ()
    )
    orientation = _first_of(
        numbers(detector, "ImageOrientationPatient", 6) or None,
        numbers(dataset, "ImageOrientationPatient", 6) or None, (),
    )
    first = _single(facts, dataset, ())._replace(position=position, orientation=orientation)
    _check_place(first)
    distance = number(dataset, "SpacingBetweenSlices")
    slices = numbers(dataset, "SliceVector") or tuple(float(n + 1) for n in range(facts.num_frames))
    if (facts.num_frames > 1 and not distance) or len(set(slices)) != facts.num_frames:
        raise Refusal("no-geometry", "slices of nuclear medicine whose order is not that of a stack", _CONVERT)
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    return [
        first._replace(number=n, position=tuple((np.array(position) + normal * (distance or 0) * (at - 1)).tolist()))
        for n, at in enumerate(slices)
    ]
