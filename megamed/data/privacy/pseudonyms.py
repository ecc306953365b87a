"""Pseudonyms: identifiers and dates replaced, the same way throughout a project and differently in the next."""

from __future__ import annotations

import datetime
import hashlib
import hmac
from typing import Literal

# 80 bits: among a billion series two share a name with a probability of one in two million.
_HEX_DIGITS = 20

# Dates move by whole days, up to this many, differently for each patient: intervals within a patient stay.
_LARGEST_SHIFT_DAYS = 3650

_PADDING = " \0"


class Pseudonyms:
    """Keyed hashes (HMAC-SHA-256, RFC 2104) of identifiers; without the key nobody can go back, nor try names out.

    Args:
        key: the project's secret key, at least 16 bytes.
        dates: `drop` them, or `shift` them by a number of days that is one patient's own.
    """

    def __init__(self, key: bytes, dates: Literal["drop", "shift"] = "drop"):
        if len(key) < 16:
            raise ValueError(f"the key has {len(key)} bytes; it needs 16")
        if dates not in ("drop", "shift"):
            raise ValueError(f"dates={dates!r}: drop or shift")
        self._key, self.dates = key, dates

    def of(self, kind: str, value: str) -> str:
        """The pseudonym of an identifier, 20 hex digits; empty for an empty value.

        Args:
            kind: what it identifies: `patient`, `study`, `series`, `instance`, `accession`. The same text as two
                kinds has two pseudonyms.
            value: as the source has it; spaces and NULs around it do not count.
        """
        text = value.strip(_PADDING)
        return self._digest(f"{kind}:{text}".encode(errors="surrogatepass")).hex()[:_HEX_DIGITS] if text else ""

    def provenance(self, content: bytes) -> str:
        """Keyed hash of content, 64 hex digits."""
        return self._digest(b"content:" + content).hex()

    def date(self, patient: str, date: str) -> str:
        """A date as it may be kept.

        Args:
            patient: whose date it is, as the source names the patient.
            date: DICOM's DA, `YYYYMMDD`.

        Returns:
            `YYYYMMDD`, or empty where dates are dropped, or there is none that can be read.
        """
        patient, date = patient.strip(_PADDING), date.strip(_PADDING)
        # strptime alone also reads dates with fewer digits.
        if self.dates == "drop" or not patient or len(date) != 8:
            return ""
        draw = int.from_bytes(self._digest(f"shift:{patient}".encode(errors="surrogatepass"))[:8], "big")
        try:
            day = datetime.datetime.strptime(date, "%Y%m%d").date()
            # Never by nothing: from 1 to the largest, back in time.
            return (day - datetime.timedelta(days=1 + draw % _LARGEST_SHIFT_DAYS)).strftime("%Y%m%d")
        except (ValueError, OverflowError):
            return ""

    def fingerprint(self) -> str:
        """Tells whether two stores were made with one key, and how they treat dates; says nothing of the key."""
        return self._digest(f"fingerprint:{self.dates}".encode()).hex()[:_HEX_DIGITS]

    def _digest(self, content: bytes) -> bytes:
        return hmac.new(self._key, content, hashlib.sha256).digest()
