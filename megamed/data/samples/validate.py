"""Everything that is wrong with a file of samples, before training comes upon it.

Beside what `parse` refuses: conversations without an answer at their end (unless `label` says that they are to be
classified), empty questions and answers, a rejected answer that is the chosen one, lines that are there twice,
pictures and films that are not there, boxes outside their picture, and, where the store is given, series that it does
not have, windows that nobody knows and choices of frames that leave none.

Nothing of what lines say is told, neither text nor path: only line numbers and keys.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megamed.data.samples.objects import fill
from megamed.data.samples.parse import Problem, read
from megamed.data.samples.schema import FrameChoice, Sample, StudyRef
from megamed.data.specialties import Specialties
from megamed.data.store import SeriesRecord, VolumeStore
from megamed.utils import UserError


def validate(
    path: str | Path,
    store: VolumeStore | None = None,
    windows: frozenset[str] | None = None,
    specialties: Specialties | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Problem]:
    """The faults of a file, in the order of its lines.

    Args:
        path: JSON Lines.
        store: where series are looked up; None leaves that out.
        windows: names of windows that are known; None leaves that out.
        specialties: pools that samples may call; None leaves that out.
        progress: is told of each line how many bytes it has.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(path)
    checks = _Checks(path.parent, store, windows, specialties)
    num_samples = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    num_samples += 1
                    yield from checks.line(line, number)
                if progress is not None:
                    progress(len(line))
    except OSError as error:
        raise UserError(f"{path}: the samples cannot be read ({error.strerror}); give a JSON Lines file") from None
    if not num_samples:
        yield Problem(0, "", "there are no samples", "write one JSON object a line")


class _Checks:
    """What is looked up for each line, and what has been seen of earlier ones."""

    def __init__(
        self,
        folder: Path,
        store: VolumeStore | None,
        windows: frozenset[str] | None,
        specialties: Specialties | None,
    ):
        self._folder, self._store, self._windows, self._specialties = folder, store, windows, specialties
        # 8 bytes of a hash a line: among ten million lines the chance that two others collide is 3 in a million.
        self._seen: dict[bytes, int] = {}

    def line(self, line: bytes, number: int) -> list[Problem]:
        """All that is wrong with one line."""
        sample, found = read(line, number)
        if sample is None:
            return found
        found = [*found]

        def add(key: str, what: str, mend: str) -> None:
            found.append(Problem(number, key, what, mend))

        first = self._seen.setdefault(_digest(line), number)
        if first != number:
            add("", f"is the same as line {first}", "take one of them out")
        if not found:
            _check_talk(sample, add)
            for fault in fill(sample, self._folder)[1]:
                add(*fault)
        self._check_files(sample, add)
        known = self._specialties
        if known is not None and not all(map(known.knows, sample.specialties or ())):
            add("specialties", "has a label that calls no pool", f"it may be {', '.join(known.labels)}, or general")
        for i, study in enumerate(sample.studies):
            self._check_study(f"studies[{i}]", study, add)
        return found

    def _check_files(self, sample: Sample, add: Callable[[str, str, str], None]) -> None:
        paths = [(f"images[{i}]", path, True) for i, path in enumerate(sample.images)]
        for i, video in enumerate(sample.videos):
            if isinstance(video, tuple):
                paths += [(f"videos[{i}][{j}]", path, True) for j, path in enumerate(video)]
            else:
                paths.append((f"videos[{i}]", video, False))
        for key, path, is_file in paths:
            if not isinstance(path, str) or "\0" in path:
                continue  # told already
            there = os.path.isfile if is_file else os.path.exists
            if not there(self._folder / path):
                add(key, "there is no such file", "paths are relative to the folder of the samples, or absolute")

    def _check_study(self, key: str, study: StudyRef, add: Callable[[str, str, str], None]) -> None:
        for i, window in enumerate(study.windows or ()):
            if isinstance(window, str) and self._windows is not None and window not in self._windows:
                add(f"{key}.windows[{i}]", "is not known", f"it may be {', '.join(sorted(self._windows))}, or "
                    "[centre, width]")
        if self._store is None:
            return
        if study.series not in self._store:
            add(f"{key}.series", "is not in the store", "ingest it, or take it out")
        elif study.frames is not None:
            _check_frames(f"{key}.frames", study.frames, self._store.record(study.series), add)


def _check_talk(sample: Sample, add: Callable[[str, str, str], None]) -> None:
    """Turns that teach nothing. A question may be empty where the sample shows something."""
    shows = bool(sample.studies or sample.videos or sample.images)
    last = len(sample.messages) - 1
    if sample.messages[last].role != "assistant" and sample.label is None:
        add(f"messages[{last}].role", f"is {sample.messages[last].role} at the end", "end with the assistant's answer")
    for i, message in enumerate(sample.messages):
        if not message.content.strip() and not (message.role == "user" and shows):
            add(f"messages[{i}].content", "is empty", "write it, or take the line out")
    if sample.rejected_response is not None:
        if not sample.rejected_response.strip():
            add("rejected_response", "is empty", "write it, or leave it out")
        elif sample.rejected_response.strip() == sample.messages[last].content.strip():
            add("rejected_response", "is the same as the answer", "give another one, or leave it out")


def _check_frames(key: str, choice: FrameChoice, record: SeriesRecord, add: Callable[[str, str, str], None]) -> None:
    """Ranges that lie beyond the series."""
    info = record.info
    num_volumes, num_slices = info.shape[:2]
    positions = info.slice_positions_mm
    extent_mm = positions[-1] if positions else (num_slices - 1) * info.spacing_mm[2]
    if choice.range_mm is not None and choice.range_mm[0] > extent_mm:
        add(f"{key}.range_mm", "begins beyond the series", f"its slices lie from 0 to {extent_mm:g} mm")
    if choice.range_s is not None:
        duration_s = (num_volumes - 1) * (info.repetition_time_s or 0.0)
        if info.kind != "run":
            add(f"{key}.range_s", "is given for a series without time", "take it out")
        elif choice.range_s[0] > duration_s:
            add(f"{key}.range_s", "begins beyond the run", f"its volumes lie from 0 to {duration_s:g} s")


def _digest(line: bytes) -> bytes:
    """Of what a line says, whatever its spaces and the order of its keys."""
    text = json.dumps(json.loads(line), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
