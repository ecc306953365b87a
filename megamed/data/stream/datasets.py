"""Where samples come from: files of conversations, and questions about the series of a store.

A sample is first a draft: what it shows, and a way to the turns. Only when its frames are chosen, and fit into a row,
are the turns known: questions may be about what is shown.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megamed.data.frames.choice import slice_positions
from megamed.data.samples import FrameChoice, Message, SampleFile, StudyRef
from megamed.data.series import SeriesInfo
from megamed.data.specialties import Specialties
from megamed.data.store import VolumeStore
from megamed.data.stream.chat import Shown, ShownFrame
from megamed.data.stream.facts import facts_of
from megamed.utils import UserError

_LABELLED = b'"specialties"'

# Lines of a file whose content is part of its fingerprint, spread over it.
_FINGERPRINT_LINES = 256


@dataclass(frozen=True)
class Draft:
    """A sample whose frames are not chosen yet.

    Attributes:
        sample_id: name of the data set and number of the line: what may be logged.
        studies: series of the store.
        videos: a path each, or the paths of its frames.
        images: paths.
        messages: the turns, once it is known what is shown.
        specialties: names of those that it calls; None leaves it to the metadata of its series.
    """

    sample_id: str
    studies: tuple[StudyRef, ...]
    videos: tuple[str | tuple[str, ...], ...]
    images: tuple[str, ...]
    messages: Callable[[Shown], Sequence[Message]]
    specialties: tuple[str, ...] | None = None


class DataSet(Protocol):
    """Samples by number."""

    name: str

    def __len__(self) -> int: ...

    def draft(self, index: int, epoch: int) -> Draft | None:
        """A sample; None for one that is held out.

        Args:
            index: its number.
            epoch: passes that went before, for what differs from one to the next.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What changes if the samples do, JSON-serialisable."""
        ...


class FileSamples:
    """A file of samples.

    Args:
        name: of the data set.
        file: the samples; paths in them are relative to its folder.
        store: has the series that they refer to; None if they refer to none.
        held_out: series that training never shows.
    """

    def __init__(self, name: str, file: SampleFile, store: VolumeStore | None, held_out: frozenset[str]):
        self.name, self._file, self._store, self._held_out = name, file, store, held_out

    def __len__(self) -> int:
        return len(self._file)

    def draft(self, index: int, epoch: int) -> Draft | None:
        """Sample number `index`.

        Raises:
            UserError: its line cannot be used, or it refers to a series that is not there.
        """
        sample = self._file[index]
        for study in sample.studies:
            if self._store is None or study.series not in self._store:
                where = self._store.root if self._store else "data.store"
                raise UserError(
                    f"{self._file.path}:{sample.line}: series {study.series} is not in {where}; ingest it, set "
                    "data.store to the store that has it, or take the sample out",
                    everywhere=True,
                )
            if study.series in self._held_out:
                return None
        folder = self._file.folder

        def absolute(path: str) -> str:
            return str(folder / path)

        videos = tuple(absolute(v) if isinstance(v, str) else tuple(map(absolute, v)) for v in sample.videos)
        images = tuple(map(absolute, sample.images))
        sample_id = f"{self.name}:{sample.line}"
        return Draft(sample_id, sample.studies, videos, images, lambda shown: sample.messages, sample.specialties)

    def check_labels(self, specialties: Specialties) -> None:
        """Look at the specialties of every sample that names some; the other lines are not parsed.

        Raises:
            UserError: a label that no pool has, with the file and the line.
        """
        for index in range(len(self)):
            if _LABELLED in self._file.line(index):
                sample = self._file[index]
                specialties.of_labels(sample.specialties or (), f"{self._file.path}:{sample.line}")

    def fingerprint(self) -> dict[str, Any]:
        """Number of samples, and a sum over some of the lines."""
        found = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(self) - 1, _FINGERPRINT_LINES).astype(int)).tolist():
            found.update(self._file.line(index) + b"\n")
        return {"samples": len(self), "content": found.hexdigest()[:16]}


class FactSamples:
    """Questions about series, made when they are asked for: another part of the stack and others in each pass.

    Args:
        name: of the data set.
        store: has the series.
        series: names of those that are asked about.
        seed: decides what is asked.
        questions: most questions of a sample.
        most_frames: shown in a sample.
    """

    def __init__(
        self, name: str, store: VolumeStore, series: Sequence[str], seed: int, questions: int, most_frames: int
    ):
        self.name, self._store, self._series = name, store, series
        self._seed, self._questions, self._most_frames = seed, questions, most_frames

    def __len__(self) -> int:
        return len(self._series)

    def draft(self, index: int, epoch: int) -> Draft:
        """Some frames of series number `index`, and questions about them."""
        info = self._store.record(self._series[index]).info
        key = (self._seed, zlib.crc32(self._series[index].encode()), epoch)
        study = StudyRef(self._series[index], frames=_choice(info, np.random.default_rng(key), self._most_frames))

        def messages(shown: Shown) -> list[Message]:
            rng = np.random.default_rng((*key, 1))
            asked = facts_of(info, _frames(shown), rng)
            chosen = [asked[i].qa for i in rng.permutation(len(asked))[: self._questions]]
            turns = []
            for number, qa in enumerate(chosen):
                turns.append(Message("user", qa.question if number else f"<study>{qa.question}"))
                turns.append(Message("assistant", qa.answer))
            return turns

        return Draft(f"{self.name}:{index + 1}.{epoch + 1}", (study,), (), (), messages)

    def fingerprint(self) -> dict[str, Any]:
        """Number of series, and a sum over their names."""
        names = hashlib.sha256(" ".join(self._series).encode()).hexdigest()[:16]
        return {"samples": len(self), "content": names}


def _choice(info: SeriesInfo, rng: np.random.Generator, most_frames: int) -> FrameChoice:
    """All of a stack or a part of it, and how many of its slices: as often few as many."""
    at_most = min(most_frames, round(2 ** rng.uniform(1.0, max(1.0, np.log2(most_frames)))))
    positions = slice_positions(info)
    if info.kind != "volume" or len(positions) < 4 or rng.random() < 0.5:
        return FrameChoice(at_most=at_most)
    first = int(rng.integers(len(positions) - 1))
    last = int(rng.integers(first + 1, len(positions)))
    return FrameChoice(range_mm=(positions[first], positions[last]), at_most=at_most)


def _frames(shown: Shown) -> list[Any]:
    return [frame.frame if isinstance(frame, ShownFrame) else frame for s in shown["studies"] for frame in s.frames]

