"""Values of a data set as plain numbers and known words, or nothing where a value is not what it should be."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from pydicom.dataset import Dataset

# Code strings (PS3.5, 6.2): capitals, digits, blank and underscore, at most 16.
_WORD = re.compile(r"[A-Z0-9_ ]{1,16}")


def number(dataset: Dataset, name: str) -> float | None:
    """The first value of an element as a finite number."""
    values = numbers(dataset, name)
    return values[0] if values else None


def whole(dataset: Dataset, name: str) -> int | None:
    """The first value of an element as a whole number."""
    value = number(dataset, name)
    return int(value) if value is not None and value == int(value) else None


def numbers(dataset: Dataset, name: str, count: int | None = None) -> tuple[float, ...]:
    """All values of an element, `count` where that is given; empty where one of them is no finite number."""
    return _as_numbers(_value(dataset, name), count)


def word(dataset: Dataset, name: str, known: Iterable[str] | None = None) -> str:
    """The first value of an element as a code string, in capitals; empty where it is none, or none of the known."""
    found = words(dataset, name)
    return found[0] if found and (known is None or found[0] in known) else ""


def words(dataset: Dataset, name: str) -> tuple[str, ...]:
    """All values of an element as code strings; what is none is left empty."""
    value = _value(dataset, name)
    if value is None:
        return ()
    parts = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    texts = [str(part).strip(" \0").upper() for part in parts]
    return tuple(text if _WORD.fullmatch(text) else "" for text in texts)


def text(dataset: Dataset, name: str) -> str:
    """The first value of an element as text, for what becomes a pseudonym."""
    value = _value(dataset, name)
    if value is None:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else ""
    return str(value).strip(" \0")


def texts(dataset: Dataset, name: str) -> tuple[str, ...]:
    """All values of an element as text, of which keywords are taken: a backslash in a description begins another."""
    value = _value(dataset, name)
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else (str(value),)


def seconds(dataset: Dataset, name: str) -> float | None:
    """Seconds since midnight of a time (TM), or of the time of a date and time (DT)."""
    value = text(dataset, name).replace(":", "")
    value = value[8:] if re.match(r"\d{14}", value) else value
    match = re.fullmatch(r"(\d\d)(\d\d)?(\d\d(?:\.\d{1,6})?)?(?:[+-]\d{4})?", value)
    if match is None:
        return None
    hours, minutes, rest = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + rest


def item(dataset: Dataset | None, name: str) -> Dataset | None:
    """The first item of a sequence."""
    if dataset is None:
        return None
    value = _value(dataset, name)
    try:
        return value[0] if value and isinstance(value[0], Dataset) else None
    except (TypeError, IndexError, KeyError):
        return None


def private(dataset: Dataset, group: int, creator: str, element: int) -> Any:
    """A private element's value, by the name of who reserved the block (PS3.5, 7.8); None where there is none."""
    for block in range(0x10, 0x14):
        try:
            owner = dataset[group << 16 | block].value
        except KeyError:
            continue
        owner = owner.decode("latin-1") if isinstance(owner, bytes) else str(owner)
        if owner.strip(" \0") == creator:
            try:
                return dataset[group << 16 | block << 8 | element].value
            except Exception:  # a private value may be anything, in any encoding
                return None
    return None


def private_number(value: Any) -> float | None:
    """The first number of a private value, which implicit files leave as bytes of text or of a float."""
    if isinstance(value, bytes):
        found = _as_numbers(value.strip(b" \0").split(b"\\")[0], None)
        if not found and len(value) in (4, 8):
            found = struct.unpack("<f" if len(value) == 4 else "<d", value)
        return found[0] if found and math.isfinite(found[0]) else None
    found = _as_numbers(value, None)
    return found[0] if found else None


def private_tags() -> list[int]:
    """The private elements that the reader may ask for, with those that name their owners."""
    wanted = {0x0019: (0x0A, 0x0C), 0x0029: (0x10,), 0x0043: (0x39, 0x2F), 0x2001: (0x03,)}
    return [
        group << 16 | tag
        for group, elements in wanted.items()
        for block in range(0x10, 0x14)
        for tag in (block, *(block << 8 | element for element in elements))
    ]


def _value(dataset: Dataset, name: str) -> Any:
    try:
        element = dataset.get(name)
    except Exception:  # pydicom converts when asked, and a damaged value fails in its own way
        return None
    return None if element is None or element == "" else element


def _as_numbers(value: Any, count: int | None) -> tuple[float, ...]:
    if value is None:
        return ()
    parts = [value] if isinstance(value, str | bytes) or not isinstance(value, Iterable) else list(value)
    try:
        found = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        return ()
    if (count is not None and len(found) != count) or not all(math.isfinite(one) for one in found):
        return ()
    return found
