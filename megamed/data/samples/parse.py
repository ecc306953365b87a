"""From a line of JSON to a `Sample`, with every fault of the line named."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

from megamed.data.samples.schema import FrameChoice, Message, Role, Sample, StudyRef
from megamed.data.samples.variants import Misfit, entries, messages
from megamed.utils import UserError

TAGS = {"<study>": "studies", "<video>": "videos", "<image>": "images"}

# What other trainers honour and this one does not; passed over in silence they would change what is learnt.
_NOT_KNOWN = ("audios", "audio", "tools", "rejected_messages", "rejected_images")
_NEXT: dict[str, tuple[str, ...]] = {
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_STUDY_KEYS = ("series", "windows", "frames")
_FRAME_KEYS = ("range_mm", "range_s", "every", "at_most")


class Problem(NamedTuple):
    """A fault of a line: where and what it is, and the mend. Never what the line says.

    Attributes:
        line: its number, from 1; 0 for the whole file.
        key: `messages[1].content`.
        what: is wrong.
        mend: what to do.
    """

    line: int
    key: str
    what: str
    mend: str

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        return f"{key}{self.what}; {self.mend}"


def parse(line: str | bytes, number: int = 0, source: str = "") -> Sample:
    """A line as a sample.

    Args:
        line: of JSON, in any of the conventions that `variants` knows.
        number: of the line, from 1.
        source: name of the file, for messages.

    Raises:
        UserError: names file, line, key, the first fault and its mend.
    """
    sample, problems = read(line, number)
    if sample is None or problems:
        where = f"{source}:{number}: " if source else f"line {number}: "
        raise UserError(f"{where}{problems[0]}")
    return sample


def read(line: str | bytes, number: int = 0) -> tuple[Sample | None, list[Problem]]:
    """A line as a sample, None where it cannot be one, and all its faults."""
    faults = _Faults(number)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        faults.add("", "is no JSON", "write one JSON object a line, in UTF-8")
        return None, faults.found
    if not isinstance(row, dict):
        faults.add("", "is no JSON object", 'write {"messages": [...], ...}')
        return None, faults.found
    for key in _NOT_KNOWN:
        if row.get(key):
            faults.add(key, "is not known here", "take it out, or leave the line out")
    turns = _messages(row, faults)
    rejected, objects = row.get("rejected_response"), row.get("objects")
    if rejected is not None and not _is_text(rejected):
        faults.add("rejected_response", "is no text", "give a text that Unicode allows")
    if objects is not None and not isinstance(objects, dict):
        faults.add("objects", "is no object", 'give {"ref": [...], "bbox": [...]}')
    sample = Sample(
        messages=turns, images=_images(row, faults), videos=_videos(row, faults), studies=_studies(row, faults),
        rejected_response=rejected, label=row.get("label"), objects=objects or {},
        specialties=_specialties(row, faults), line=number,
    )
    if not faults.found:
        _check_tags(sample, faults)
    return sample, faults.found


def _specialties(row: dict[str, Any], faults: _Faults) -> tuple[str, ...] | None:
    value = row.get("specialties")
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(_is_text(name) and name for name in names):
        faults.add("specialties", "are no names", 'give the names of pools, ["chest"], or an empty list for none')
        return ()
    return tuple(names)


class _Faults:
    def __init__(self, line: int):
        self.line, self.found = line, list[Problem]()

    def add(self, key: str, what: str, mend: str) -> None:
        self.found.append(Problem(self.line, key, what, mend))


def _messages(row: dict[str, Any], faults: _Faults) -> tuple[Message, ...]:
    try:
        key, turns = messages(row)
    except Misfit as misfit:
        faults.add(misfit.key, misfit.what, misfit.mend)
        return ()
    result, before = [], ""
    # In pretraining the text may stand alone.
    alone = [role for role, _, _ in turns if role != "system"] == ["assistant"]
    for i, (role, content, loss) in enumerate(turns):
        where = f"{key}[{i}]"
        if role not in _NEXT[before] and not (alone and role == "assistant"):
            after = f"after {before}" if before else "at the beginning"
            faults.add(f"{where}.role", f"is {role} {after}", f"there comes {' or '.join(_NEXT[before])}")
        if not _is_text(content):
            faults.add(f"{where}.content", "is no text", "give a text that Unicode allows")
        if loss is not None and not isinstance(loss, bool):
            faults.add(f"{where}.loss", "is neither true nor false", "give one of them, or leave it out")
        assert role in get_args(Role)
        result.append(Message(role, content, loss))  # type: ignore[arg-type]
        before = role
    return tuple(result)


def _images(row: dict[str, Any], faults: _Faults) -> tuple[str, ...]:
    values = entries(row, "images", "image")
    for i, value in enumerate(values):
        _check_path(f"images[{i}]", value, faults)
    return tuple(values)


def _videos(row: dict[str, Any], faults: _Faults) -> tuple[str | tuple[str, ...], ...]:
    values = entries(row, "videos", "video")
    for i, value in enumerate(values):
        if isinstance(value, list) and value:
            for j, path in enumerate(value):
                _check_path(f"videos[{i}][{j}]", path, faults)
        else:
            _check_path(f"videos[{i}]", value, faults)
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _check_path(key: str, value: Any, faults: _Faults) -> None:
    if isinstance(value, dict):
        faults.add(key, "has no path", "write the picture to a file, and give its path")
    elif not _is_text(value) or not value.strip() or "\0" in value:
        faults.add(key, "is no path", "give the path of a file")
    elif value.startswith(("http://", "https://", "data:")):
        faults.add(key, "is no path but an address or the content itself", "fetch it, and give the path of the file")


def _studies(row: dict[str, Any], faults: _Faults) -> tuple[StudyRef, ...]:
    values = row.get("studies")
    if values is None:
        return ()
    if not isinstance(values, list):
        faults.add("studies", "is no list", 'give [{"series": ...}, ...]')
        return ()
    studies = []
    for i, value in enumerate(values):
        where = f"studies[{i}]"
        if isinstance(value, str):
            value = {"series": value}
        if not isinstance(value, dict) or not _is_text(value.get("series")) or not value["series"]:
            faults.add(where, "names no series", 'give {"series": its name in the store}')
            continue
        _check_keys(where, value, _STUDY_KEYS, faults)
        windows, frames = value.get("windows"), value.get("frames")
        studies.append(StudyRef(
            value["series"],
            None if windows is None else _windows(f"{where}.windows", windows, faults),
            None if frames is None else _frames(f"{where}.frames", frames, faults),
        ))
    return tuple(studies)


def _windows(key: str, values: Any, faults: _Faults) -> tuple[str | tuple[float, float], ...] | None:
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list) or len(values) not in (1, 3):
        faults.add(key, "are not 1 or 3", 'give one for all channels or three, names or [centre, width]')
        return None
    windows: list[str | tuple[float, float]] = []
    for i, value in enumerate(values):
        if isinstance(value, str):
            windows.append(value)
        elif _numbers(value, 2) and value[1] > 0:
            windows.append((float(value[0]), float(value[1])))
        else:
            faults.add(f"{key}[{i}]", "is no window", "give a name, or [centre, width] with a width above 0")
    return tuple(windows)


def _frames(key: str, value: Any, faults: _Faults) -> FrameChoice | None:
    if not isinstance(value, dict):
        faults.add(key, "is no object", 'give {"at_most": 64}, say')
        return None
    _check_keys(key, value, _FRAME_KEYS, faults)
    ranges: dict[str, tuple[float, float] | None] = {}
    for name in ("range_mm", "range_s"):
        pair = value.get(name)
        ranges[name] = None
        if pair is None:
            continue
        if not _numbers(pair, 2) or not 0 <= pair[0] <= pair[1]:
            faults.add(f"{key}.{name}", "is no range", "give from and to, from 0 on, the smaller first")
        else:
            ranges[name] = float(pair[0]), float(pair[1])
    counts = {}
    for name, default in (("every", 1), ("at_most", None)):
        number = value.get(name)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            faults.add(f"{key}.{name}", "is no count", "give a whole number from 1 on")
            number = None
        counts[name] = default if number is None else number
    return FrameChoice(ranges["range_mm"], ranges["range_s"], counts["every"] or 1, counts["at_most"])


def _check_keys(where: str, value: dict[str, Any], known: Iterable[str], faults: _Faults) -> None:
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            faults.add(where, "has a key that is not known",
                       f"did you mean {near[0]}?" if near else f"it may have {', '.join(known)}")


def _check_tags(sample: Sample, faults: _Faults) -> None:
    text = "".join(message.content for message in sample.messages)
    for tag, name in TAGS.items():
        num_tags, num_entries = text.count(tag), len(getattr(sample, name))
        if num_tags > num_entries:
            faults.add(name, f"has {num_entries} entries and the messages {num_tags} {tag}",
                       f"give an entry for each {tag}, or take the tag out")
        elif 0 < num_tags < num_entries:
            faults.add(name, f"has {num_entries} entries and the messages {num_tags} {tag}",
                       f"put a {tag} for each, or none to have all of them before the first question")


def _is_text(value: Any) -> bool:
    """Whether it is a text, and not half of a character: JSON can write one half of a UTF-16 pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) for number in value
    )
