"""Which specialties a study calls, by what its metadata say, and how tokens carry them.

A specialty is a name that a radiologist understands (chest, neuro, breast). A set of them is one whole number, bit i
for the i-th: a packed row has one such number a token, so that studies of different specialties share a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Bits of a signed 64-bit number, one of which marks padding where tokens are routed.
MOST_SPECIALTIES = 62


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
    """Medical terms that the study's or the series' description has, as ingest keeps them (`SeriesInfo.keywords`)."""


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
