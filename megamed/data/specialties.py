"""Which specialties a study calls, by what its metadata say, and how tokens carry them.

A specialty is a name that a radiologist understands (chest, neuro, breast). A set of them is one whole number, bit i
for the i-th: a packed row has one such number a token, so that studies of different specialties share a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from megamed.config.load import did_you_mean
from megamed.data.keywords import term_of
from megamed.data.series import SeriesInfo
from megamed.utils import UserError

if TYPE_CHECKING:
    from megamed.data.batch import Microbatch

# They are bits of a signed 64-bit number.
MOST_SPECIALTIES = 62

# The pool that every token may choose from: no specialty, and a label that calls none.
GENERAL = "general"


@dataclass
class MatchRule:
    """What a series has to be for a rule to hold: everything that is given, and of each list any entry.

    Letters' case does not count.
    """

    modality: list[str] = field(default_factory=list)
    """DICOM's codes: CT, MR, CR, ..."""
    body_part: list[str] = field(default_factory=list)
    """DICOM's codes: CHEST, BRAIN, ..."""
    keywords: list[str] = field(default_factory=list)
    """Terms of the study's and series' descriptions, or what stands for them: stroke, lung nodule, ... Ingest keeps
    those that `megamed.data.keywords` lists."""

    def holds(self, info: SeriesInfo) -> bool:
        """Whether it holds for a series; a rule that gives nothing holds for none."""
        given = (
            (self.modality, {info.modality.upper()}, str.upper),
            (self.body_part, {info.body_part.upper()}, str.upper),
            (self.keywords, set(info.keywords), term_of),
        )
        asked = [(found, set(map(normal, wanted))) for wanted, found, normal in given if wanted]
        return bool(asked) and all(found & wanted for found, wanted in asked)

    def unknown_keyword(self) -> str | None:
        """A keyword that no description is searched for, if it has one."""
        return next((word for word in self.keywords if term_of(word) is None), None)


@dataclass(frozen=True)
class Specialty:
    """A specialty and what calls it.

    Attributes:
        name: the name of its pool of experts.
        rules: a series that one of them holds for calls it.
        labels: other names that a sample may call it by.
    """

    name: str
    rules: tuple[MatchRule, ...] = ()
    labels: tuple[str, ...] = ()


class Specialties:
    """Matches series and labels with specialties.

    Args:
        known: the specialties, bit i for the i-th; none for a model without pools, which calls nothing.
    """

    def __init__(self, known: Sequence[Specialty] = ()):
        self.known = tuple(known)
        self._bits = {word.lower(): 1 << i for i, s in enumerate(known) for word in (s.name, *s.labels)}

    def of_series(self, info: SeriesInfo) -> int:
        """What a series calls by its metadata."""
        return sum(1 << i for i, s in enumerate(self.known) if any(rule.holds(info) for rule in s.rules))

    @property
    def labels(self) -> tuple[str, ...]:
        """All that a sample may call a pool by, in small letters."""
        return tuple(self._bits)

    def knows(self, label: str) -> bool:
        """Whether a sample may have such a label."""
        return label.lower() in self._bits or label.lower() == GENERAL

    def of_labels(self, labels: Iterable[str], where: str) -> int:
        """What a sample calls by its labels; nothing where the model has no pools.

        Args:
            labels: names of pools or other labels of theirs.
            where: names the sample in the message.

        Raises:
            UserError: no pool has such a label.
        """
        called = 0
        for label in labels if self.known else ():
            word = label.lower()
            if word == GENERAL:
                continue
            if not self.knows(word):
                hint = did_you_mean(word, self._bits) or f"there are: {', '.join(self._bits)}"
                raise UserError(
                    f"{where}: its specialty {label!r} is no pool's name or label; {hint} "
                    "(model.language.moe.pools)",
                    everywhere=True,
                )
            called |= self._bits[word]
        return called


def drop_specialties(microbatch: Microbatch, probability: float, seed: int, index: int) -> Microbatch:
    """The row with the specialties of some of its documents withheld.

    Args:
        microbatch: row number `index`.
        probability: that a document's are.
        seed, index: with the document's number in the row they decide, so that it is the same at every layout and
            after a resume.
    """
    if probability == 0 or not bool(microbatch.specialty_S.any()):
        return microbatch
    bounds = microbatch.cu_seqlens.tolist()
    drawn = np.random.default_rng((seed, index, len(bounds))).random(len(bounds) - 1)
    specialty_S = microbatch.specialty_S.clone()
    for start, end, draw in zip(bounds, bounds[1:], drawn, strict=False):
        if draw < probability:
            specialty_S[start:end] = 0
    return replace(microbatch, specialty_S=specialty_S)
