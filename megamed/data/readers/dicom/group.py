"""Which slices are one stack or run, and what that part of a series is called for ever.

A DICOM series is split by what must not lie in one array: orientation, matrix, pixel spacing, echo time, b-value,
kind of image (magnitude, phase, ...), stack of an enhanced object, and acquisition where acquisitions are stacks of
their own. A part is called by its own values of these, so its name stays whatever other files are there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megamed.data.orientation import find_turn
from megamed.data.readers.base import FileHeader, Grouping, Refusal, SeriesPlan
from megamed.data.readers.dicom.facts import LOCALIZER, Facts
from megamed.data.readers.dicom.geometry import Item, Place, Stack, find_places, is_regular, measure
from megamed.data.readers.dicom.volumes import Volume, sort_volumes

# Direction cosines that differ by less are the same: half a pixel at the edge of 512.
_SAME_COSINE = 1e-3
_SAME_SPACING = 1e-3

# An orientation is called by its plane alone up to this deviation of a cosine; beyond, a few digits tell it apart.
_STRAIGHT = 0.02

# CT shows where it will scan in one to three pictures of other orientation.
_MOST_LOCALIZERS = 3

# From this many acquisitions of CT at the same places on, they are a run (perfusion), not phases of their own.
_ACQUISITIONS_OF_A_RUN = 4

_Words = dict[str, str]


@dataclass
class Part:
    """Slices that belong together, in order.

    Attributes:
        words: what it is called by, by the kind of each word.
        items: all its slices.
        volumes: slices, volume by volume.
        stack: its geometry.
        left_out: slices of an unfinished volume.
        refusal: why it cannot be used; nothing else but `words` and `items` is then filled.
    """

    words: _Words
    items: list[Item]
    volumes: list[Volume] = field(default_factory=list)
    stack: Stack | None = None
    left_out: list[Item] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    refusal: Refusal | None = None

    @property
    def name(self) -> str:
        return " ".join(word for word in self.words.values() if word)


def group(headers: Sequence[FileHeader], reader: str) -> Grouping:
    """See `Reader.group`."""
    grouping = Grouping([], [])
    series: dict[str, list[tuple[FileHeader, Facts]]] = {}
    for header in sorted(headers, key=lambda header: str(header.path)):
        series.setdefault(header.identity.series, []).append((header, Facts.of(header)))
    for _, files in sorted(series.items()):
        _group_series(files, reader, grouping)
    return grouping


def parts_of(files: Sequence[tuple[FileHeader, Facts]]) -> list[Part]:
    """The stacks and runs that the slices of files make; the same for the files of one part alone."""
    items = [Item(header, facts, frame) for header, facts in files for frame in facts.frames]
    parts = []
    for alike in _alike(items):
        for acquisition in _acquisitions(alike):
            parts.append(_part(acquisition, len(acquisition) < len(alike)))
    _tell_apart(parts)
    return sorted(parts, key=lambda part: part.name)


def _tell_apart(parts: Sequence[Part]) -> None:
    """Parts that differ by less than their names say are told apart by more digits of what differs."""
    names = Counter(part.name for part in parts)
    for part in parts:
        if names[part.name] > 1:
            facts, frame = part.items[0].facts, part.items[0].frame
            own = (facts.modality, [round(value, 3) for value in frame.orientation], frame.spacing, frame.types)
            part.words["own"] = hashlib.sha256(repr(own).encode()).hexdigest()[:8]


def _group_series(files: list[tuple[FileHeader, Facts]], reader: str, grouping: Grouping) -> None:
    seen: set[str] = set()
    usable = []
    for header, facts in files:
        if facts.instance in seen:
            again = Refusal("duplicate", "the same object lies here twice", "nothing: the other copy is used")
            grouping.refused.append((header, again))
        elif (refusal := _concatenation_fault(facts, files)) is not None:
            grouping.refused.append((header, refusal))
        else:
            usable.append((header, facts))
        seen.add(facts.instance)
    pictures = [(header, facts) for header, facts in usable if facts.kind != "stack"]
    for header, facts in pictures:
        grouping.plans.append(_picture(header, facts, reader, alone=len(usable) == 1))
    parts = parts_of([file for file in usable if file[1].kind == "stack"])
    _refuse_localizers(parts)
    for part in parts:
        if part.refusal is not None:
            for header in _headers(part.items):
                grouping.refused.append((header, part.refusal))
            continue
        used = [item for volume in part.volumes for item in volume]
        headers = _headers(used)
        facts = used[0].facts
        grouping.plans.append(SeriesPlan(
            reader=reader, identity=headers[0].identity, part=part.name, headers=tuple(headers),
            num_voxels=len(used) * facts.rows * facts.columns, notes=part.notes, label=_label(part, parts),
        ))
        kept = {id(header) for header in headers}
        for header in _headers(part.left_out):
            if id(header) not in kept:
                refusal = Refusal("incomplete-volume", "a slice of an unfinished volume", "nothing: the rest is used")
                grouping.refused.append((header, refusal))


def _picture(header: FileHeader, facts: Facts, reader: str, alone: bool) -> SeriesPlan:
    """A picture is a series of its own, called by its object."""
    label = "" if alone else f"picture {facts.frames[0].instance or ''} {facts.view}".strip()
    channels = 1 if facts.photometric.startswith("MONOCHROME") else 3
    return SeriesPlan(
        reader=reader, identity=header.identity, part=f"picture {facts.instance[:10]}", headers=(header,),
        num_voxels=facts.rows * facts.columns * channels, label=label,
    )


def _concatenation_fault(facts: Facts, files: Sequence[tuple[FileHeader, Facts]]) -> Refusal | None:
    """An object that was written in several files (PS3.3, C.7.6.16.2.2.4) is whole or not used."""
    if not facts.concatenation:
        return None
    uid, _, total = facts.concatenation
    there = {other.concatenation[1] for _, other in files if other.concatenation and other.concatenation[0] == uid}
    if there == set(range(1, (total or len(there)) + 1)):
        return None
    return Refusal("incomplete-concatenation", f"{len(there)} of {total or 'more'} files of one object",
                   "copy the missing files")


def _headers(items: Sequence[Item]) -> list[FileHeader]:
    """The files of slices, each once, in the order of the slices."""
    return list({id(item.header): item.header for item in items}.values())


def _alike(items: Sequence[Item]) -> list[list[Item]]:
    """Slices that may lie in one array, in the order in which the first of each came."""
    groups: list[tuple[tuple, np.ndarray, np.ndarray, list[Item]]] = []
    for item in items:
        facts, frame = item.facts, item.frame
        exact = (
            facts.modality, facts.rows, facts.columns, facts.grid,
            frame.echo_ms, frame.b_value, frame.types, frame.stack,
        )
        cosines, spacing = np.array(frame.orientation), np.array(frame.spacing)
        for other_exact, other_cosines, other_spacing, members in groups:
            if (
                exact == other_exact
                and np.abs(cosines - other_cosines).max() < _SAME_COSINE
                and np.abs(spacing / other_spacing - 1).max() < _SAME_SPACING
            ):
                members.append(item)
                break
        else:
            groups.append((exact, cosines, spacing, [item]))
    return [members for *_, members in groups]


def _acquisitions(items: list[Item]) -> list[list[Item]]:
    """Split slices that are alike by acquisition, where acquisitions are stacks of their own.

    They are not where each volume, or each slice, has a number of its own: then all slices are one stack, or run.
    """
    by_number: dict[int | None, list[Item]] = {}
    for item in items:
        by_number.setdefault(item.frame.acquisition, []).append(item)
    told = all(item.frame.temporal is not None or item.frame.dimensions for item in items)
    if len(by_number) < 2 or None in by_number or told:
        return [items]
    acquisitions = [by_number[number] for number in sorted(by_number, key=lambda number: number or 0)]
    places = find_places(items)
    repeated = any(len(place.items) > 1 for place in places)
    own = [find_places(acquisition) for acquisition in acquisitions]
    if not repeated:
        stacks = all(len(one) > 2 and is_regular(one) for one in own)
        return acquisitions if stacks and not is_regular(places) else [items]
    if any(len(place.items) > 1 for one in own for place in one):
        return [items]
    complete = sum(len(one) == len(places) for one in own)
    is_run = 2 * complete > len(own) and (items[0].facts.modality != "CT" or len(own) >= _ACQUISITIONS_OF_A_RUN)
    stacks = all(len(one) > 2 or len(one) == len(places) for one in own)
    return acquisitions if stacks and not is_run else [items]


def _part(items: list[Item], is_acquisition: bool) -> Part:
    places = find_places(items)
    words = _words(items)
    if is_acquisition:
        words["acquisition"] = f"acquisition {items[0].frame.acquisition}"
    part = Part(words, items)
    try:
        part.volumes, notes, part.left_out = sort_volumes(places)
        kept = {id(item) for volume in part.volumes for item in volume}
        used = [Place(p.distance_mm, [item for item in p.items if id(item) in kept]) for p in places]
        part.stack = measure(used)
        part.notes = (*part.stack.notes, *notes)
    except Refusal as refusal:
        part.refusal = refusal
    return part


def _words(items: Sequence[Item]) -> _Words:
    """What a part is called by, from its own values alone."""
    facts, frame = items[0].facts, items[0].frame
    cosines = np.mean([item.frame.orientation for item in items], axis=0)
    axes = np.eye(4)
    axes[:3, 0], axes[:3, 1], axes[:3, 2] = cosines[:3], cosines[3:], np.cross(cosines[:3], cosines[3:])
    plane: str = find_turn(axes, 2).plane
    if np.abs(cosines - np.rint(cosines)).max() > _STRAIGHT:
        rounded = " ".join(f"{round(float(value), 2) + 0.0:.2f}" for value in cosines)
        plane += f" {hashlib.sha256(rounded.encode()).hexdigest()[:4]}"
    row, column = (f"{value:.3g}" for value in frame.spacing)
    return {
        "orientation": plane,
        "matrix": f"{facts.columns}x{facts.rows}",
        "pixel": f"{column}x{row} mm",
        "echo": "" if frame.echo_ms is None else f"TE {frame.echo_ms:g} ms",
        "b": "" if frame.b_value is None else f"b {frame.b_value:g}",
        "type": " ".join(one for one in frame.types if one not in ("ORIGINAL", "PRIMARY")),
        "stack": f"stack {frame.stack}" if frame.stack else "",
    }


def _label(part: Part, parts: Sequence[Part]) -> str:
    """What tells a part from the others of its series, for people."""
    differing = [kind for kind in _kinds(parts) if len({other.words.get(kind, "") for other in parts}) > 1]
    words = {**part.words, "orientation": part.words["orientation"].partition(" ")[0]}
    return ", ".join(word for kind in differing if (word := words.get(kind, "")))


def _kinds(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(kind for part in parts for kind in part.words))


def _refuse_localizers(parts: Sequence[Part]) -> None:
    """A few CT pictures of another orientation than the slices, or along the body at all, are scouts."""
    largest = max((len(part.items) for part in parts), default=0)
    for part in parts:
        facts = part.items[0].facts
        few = len(part.items) <= _MOST_LOCALIZERS
        lone = facts.original and part.words["orientation"].partition(" ")[0] != "axial"
        other = largest > _MOST_LOCALIZERS and any(
            other.words["orientation"] != part.words["orientation"] and len(other.items) == largest for other in parts
        )
        if facts.modality == "CT" and few and (lone or other):
            part.refusal = LOCALIZER
