"""Samples made into documents that fit into a row."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import repeat
from typing import Literal

from megamed.data.batch import Document
from megamed.data.frames import FramesConfig, PlannedStudy
from megamed.data.frames.plan import plan_image, plan_series, plan_video
from megamed.data.samples import FrameChoice, StudyRef
from megamed.data.specialties import Specialties
from megamed.data.store import SeriesRecord, VolumeStore
from megamed.data.stream.chat import ChatWriter, Shown
from megamed.data.stream.datasets import Draft
from megamed.utils import UserError

log = logging.getLogger("megamed.data")

TooLong = Literal["fewer_frames", "skip", "refuse"]

# Headers of series that are kept: some kilobytes each.
_CACHED_SERIES = 4096


class Documents:
    """Makes documents of drafts.

    Args:
        writer: makes tokens of turns and frames.
        store: has the series; None where no sample refers to one.
        frames: which frames are shown, and how.
        image_size: edge of a frame in pixels.
        seq_length: most tokens of a document.
        too_long: what becomes of longer ones.
        specialties: which of them a sample calls.

    Attributes:
        num_too_long: how many samples of each data set were.
    """

    def __init__(
        self,
        writer: ChatWriter,
        store: VolumeStore | None,
        frames: FramesConfig,
        image_size: int,
        seq_length: int,
        too_long: TooLong,
        specialties: Specialties | None = None,
    ):
        self.writer, self.store, self.frames, self.image_size = writer, store, frames, image_size
        self.seq_length, self.too_long = seq_length, too_long
        self.specialties = specialties or Specialties()
        self.num_too_long: Counter[str] = Counter()
        self._met: set[str] = set()
        self._record = lru_cache(_CACHED_SERIES)(self._read_record)

    def document(self, draft: Draft, seed: int) -> Document | None:
        """The document of a sample; None if it is too long and left out, or if there is nothing to say of it.

        Args:
            draft: the sample.
            seed: of its frames' augmentation.

        Raises:
            UserError: it is too long, and `too_long` is `refuse`.
        """
        shown = self.shown(draft)
        document = self._write(draft, shown, seed)
        if document is None or len(document.tokens) <= self.seq_length:
            return document
        if self.too_long == "refuse":
            raise UserError(
                f"sample {draft.sample_id} has {len(document.tokens)} tokens and data.seq_length is "
                f"{self.seq_length}; raise it, or set data.too_long to fewer_frames or skip",
                everywhere=True,
            )
        shorter = self._with_fewer_frames(draft, shown, document, seed) if self.too_long == "fewer_frames" else None
        self._count(draft, document, shorter)
        return shorter

    def shown(self, draft: Draft, most: Sequence[int] | None = None) -> Shown:
        """What a sample shows.

        Args:
            draft: the sample.
            most: most frames of each study, then of each video; None for as many as they are to have.
        """
        limits: Iterator[int | None] = iter(most) if most is not None else repeat(None)
        return {
            "studies": [self._study(study, next(limits)) for study in draft.studies],
            "videos": [plan_video(video, self.frames, self._choice(None, next(limits))) for video in draft.videos],
            "images": [plan_image(image, self.frames, self.image_size) for image in draft.images],
        }

    def called(self, draft: Draft) -> int:
        """Specialties that a sample calls: by its own labels, or by the metadata of its series.

        Raises:
            UserError: a label that no pool has.
        """
        if draft.specialties is not None:
            return self.specialties.of_labels(draft.specialties, f"sample {draft.sample_id}")
        called = 0
        for study in draft.studies:
            called |= self.specialties.of_series(self._record(study.series).info)
        return called

    def _study(self, study: StudyRef, most: int | None) -> PlannedStudy:
        record, store = self._record(study.series), self.store
        assert store is not None
        study = replace(study, frames=self._choice(study.frames, most))
        carpets = store.root.with_name(f"{store.root.name}.parcels")
        return plan_series(record.info, record.voxels_path, study, self.frames, carpets, self.image_size)

    def _choice(self, choice: FrameChoice | None, most: int | None) -> FrameChoice | None:
        if most is None:
            return choice
        return replace(choice or FrameChoice(every=self.frames.choice.every), at_most=most)

    def _read_record(self, series: str) -> SeriesRecord:
        assert self.store is not None
        return self.store.record(series)

    def _write(self, draft: Draft, shown: Shown, seed: int) -> Document | None:
        messages = draft.messages(shown)
        if not messages:
            return None
        document = self.writer.document(messages, shown, seed, draft.sample_id)
        document.specialties = self.called(draft)
        return document

    def _with_fewer_frames(self, draft: Draft, shown: Shown, whole: Document, seed: int) -> Document | None:
        """The document with as many of its frames, spread evenly, as fit; None if not even one of each does."""
        counts = [len(planned.frames) for planned in (*shown["studies"], *shown["videos"])]
        least = self._write(draft, self.shown(draft, [1] * len(counts)), seed)
        if least is None or len(least.tokens) > self.seq_length or len(least.frames) == len(whole.frames):
            return None
        per_frame = (len(whole.tokens) - len(least.tokens)) / (len(whole.frames) - len(least.frames))
        keep = len(least.frames) + int((self.seq_length - len(least.tokens)) / per_frame)
        while keep > len(least.frames):
            most = [max(1, count * keep // sum(counts)) for count in counts]
            document = self._write(draft, self.shown(draft, most), seed)
            if document is not None and len(document.tokens) <= self.seq_length:
                return document
            keep -= 1  # labels are not all as long
        return least

    def _count(self, draft: Draft, whole: Document, shorter: Document | None) -> None:
        if draft.sample_id in self._met:
            return
        self._met.add(draft.sample_id)
        name = draft.sample_id.partition(":")[0]
        self.num_too_long[name] += 1
        count = self.num_too_long[name]
        if str(count).strip("0") == "1":  # the 1st, 10th, 100th, ...
            fate = f"shown with {len(shorter.frames)} of its {len(whole.frames)} frames" if shorter else "left out"
            log.warning(
                "sample %s has %d tokens, data.seq_length is %d: it is %s (data.too_long=%s); %d of %s so far",
                draft.sample_id, len(whole.tokens), self.seq_length, fate, self.too_long, count, name,
            )
