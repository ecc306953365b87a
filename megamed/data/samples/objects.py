"""Boxes of a sample in ms-swift's convention, and how InternVL writes them.

    {"messages": [{"role": "user", "content": "<image>Find the <ref-object>."},
                  {"role": "assistant", "content": "<bbox>"}],
     "images": ["a.png"], "objects": {"ref": ["nodule"], "bbox": [[331, 761, 853, 1594]]}}

`ref` and `bbox` stand in for the next `<ref-object>` and `<bbox>` of the text: `<ref>nodule</ref>` and
`<box>[[173, 310, 445, 649]]</box>`, in thousandths of width and height. A box is x and y of its top left and bottom
right corners, or of one point. `bbox_type` says in what: `real`, pixels of the picture whose number in `images` is in
`image_id` (0 where that is left out), `norm1`, from 0 to 1, or `norm1000`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamed.data.samples.schema import Sample

REF, BOX = "<ref-object>", "<bbox>"
BOX_TYPES = ("real", "norm1", "norm1000")
_PLACE = re.compile(f"{REF}|{BOX}")

Fault = tuple[str, str, str]
"""Key, what is wrong, and the mend."""


def fill(sample: Sample, folder: Path) -> tuple[Sample, list[Fault]]:
    """A sample with names and boxes in their places, and what is wrong with them.

    Args:
        sample: as `parse` gives it.
        folder: that its paths are relative to.
    """
    text = "".join(message.content for message in sample.messages)
    if not sample.objects and not _PLACE.search(text):
        return sample, []
    faults = list(_check(sample, text))
    if faults:
        return sample, faults
    boxes: list[str] = []
    for i, box in enumerate(sample.objects.get("bbox") or []):
        found = _thousandths(sample, folder, i, box)
        if isinstance(found, list):
            boxes.append(f"<box>[{found}]</box>")
        else:
            faults.append(found)
    if faults:
        return sample, faults
    names = iter([f"<ref>{name}</ref>" for name in sample.objects.get("ref") or []])
    written = iter(boxes)
    messages = [
        replace(message, content=_PLACE.sub(lambda place: next(names if place[0] == REF else written), message.content))
        for message in sample.messages
    ]
    return replace(sample, messages=tuple(messages)), []


def _check(sample: Sample, text: str) -> Iterator[Fault]:
    """Lists that are lists, a place for each entry or for none, entries of their kind."""
    objects = sample.objects
    for key, tag in (("ref", REF), ("bbox", BOX)):
        values = objects.get(key) or []
        num_tags = text.count(tag)
        if not isinstance(values, list):
            yield f"objects.{key}", "is no list", "give a list"
        elif num_tags not in (0, len(values)) or (num_tags and not values):
            yield (f"objects.{key}", f"has {len(values)} entries and the messages {num_tags} {tag}",
                   f"put a {tag} for each")
        elif key == "ref" and not all(isinstance(value, str) for value in values):
            yield "objects.ref", "has an entry that is no text", "give texts"
        elif key == "bbox":
            for i, box in enumerate(values):
                if not isinstance(box, list) or len(box) not in (2, 4) or not all(map(_is_number, box)):
                    yield (f"objects.bbox[{i}]", "is no box",
                           "give x and y of a point, or of the corners at the top left and bottom right")
    if objects.get("bbox_type", "real") not in BOX_TYPES:
        yield "objects.bbox_type", "is not known", f"it may be {', '.join(BOX_TYPES)}"


def _thousandths(sample: Sample, folder: Path, index: int, box: list[float]) -> list[int] | Fault:
    key = f"objects.bbox[{index}]"
    sides = _sides(sample, folder, index)
    if sides is None:
        return key, "is in pixels of a picture that is not there", "mend images and objects.image_id"
    width, height = sides
    if not all(0 <= x <= width for x in box[::2]) or not all(0 <= y <= height for y in box[1::2]):
        return key, f"lies outside {width:g} x {height:g}", "mend it, or bbox_type"
    if len(box) == 4 and (box[0] > box[2] or box[1] > box[3]):
        return key, "has its corners in the wrong order", "give top left, then bottom right"
    return [round(1000 * value / (height if i % 2 else width)) for i, value in enumerate(box)]


def _sides(sample: Sample, folder: Path, index: int) -> tuple[float, float] | None:
    """Width and height of what a box lies in; None where its picture cannot be told or read."""
    kind = sample.objects.get("bbox_type", "real")
    if kind != "real":
        return (1.0, 1.0) if kind == "norm1" else (1000.0, 1000.0)
    from PIL import Image

    numbers = sample.objects.get("image_id") or [0] * (index + 1)
    try:
        if not 0 <= numbers[index] < len(sample.images):
            return None
        with Image.open(folder / sample.images[numbers[index]]) as image:
            return image.size
    except (OSError, ValueError, IndexError, TypeError, KeyError, Image.DecompressionBombError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
