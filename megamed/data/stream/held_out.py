"""Which patients training never shows, and what is asked about them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence

import numpy as np

from megamed.data.samples import FrameChoice, Message, StudyRef
from megamed.data.source import HeldOutItem
from megamed.data.store import VolumeStore
from megamed.data.stream.datasets import Draft
from megamed.data.stream.documents import Documents
from megamed.data.stream.facts import facts_of

# A question with its frames takes at most this share of a row: its answer has to fit in, too.
_SHARE_OF_ROW = 0.75


class HeldOutSeries:
    """Questions about series that training never shows.

    Args:
        store: has them.
        series: their names.
        most_frames: shown with a question; fewer where a row is too short.
    """

    def __init__(self, store: VolumeStore, series: Sequence[str], most_frames: int):
        self.store, self.series, self.most_frames = store, series, most_frames

    def items(self, documents: Documents, seed: int) -> list[HeldOutItem]:
        """The questions, always the same."""
        most_tokens, items = int(_SHARE_OF_ROW * documents.seq_length), []
        for number in range(len(self.series)):
            most_frames, found = self.most_frames, self._about(documents, seed, number, self.most_frames)
            while most_frames > 1 and any(len(item.prompt_tokens) > most_tokens for item in found):
                most_frames //= 2
                found = self._about(documents, seed, number, most_frames)
            items += [item for item in found if len(item.prompt_tokens) <= most_tokens]
        return items

    def _about(self, documents: Documents, seed: int, number: int, most_frames: int) -> list[HeldOutItem]:
        series = self.series[number]
        study = StudyRef(series, frames=FrameChoice(at_most=most_frames))
        draft = Draft("", (study,), (), (), lambda shown: ())
        shown, called = documents.shown(draft), documents.called(draft)
        rng = np.random.default_rng((seed, zlib.crc32(series.encode())))
        found = []
        for asked in facts_of(self.store.record(series).info, shown["studies"][0].frames, rng):
            item_id = f"held-out:{number + 1}:{asked.qa.name}"
            prompt = documents.writer.prompt([Message("user", f"<study>{asked.qa.question}")], shown, item_id)
            found.append(HeldOutItem(
                item_id, prompt.tokens, prompt.visual_positions, prompt.frames, asked.qa, asked.judge, called
            ))
        return found


def held_out_patients(patients: set[str], share: float) -> set[str]:
    """The patients that training never shows: about `share` of them, but of two or more neither none nor all.

    Each is chosen by a hash of the pseudonym alone, whoever else is there: a store that grows moves nobody to the other
    side, once more than a handful are in it.
    """
    if share == 0 or len(patients) < 2:
        return set()
    ranked = sorted(patients, key=_place)
    chosen = {patient for patient in patients if _place(patient) < share}
    return (chosen or {ranked[0]}) - ({ranked[-1]} if len(chosen) == len(patients) else set())


def _place(patient: str) -> float:
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
