"""The table of files that were refused: what, why, and what to do about it.

It names source files, which may name patients, and so lies in the private folder.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from megamed.data.readers import Refusal

NAME = "quarantine.csv"
COLUMNS = ("file", "code", "reason", "mend")

# A spreadsheet takes a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@")


class Row(NamedTuple):
    """A file that was refused."""

    file: str
    code: str
    reason: str
    mend: str


def row(path: str, refusal: Refusal) -> Row:
    """A file and why it was refused, as the table has them."""
    return Row(*(cell(text) for text in (path, refusal.code, refusal.reason, refusal.mend)))


def cell(text: str) -> str:
    """Text on one line that no spreadsheet runs; control characters, and bytes that are no UTF-8, as \\x1f."""
    shown = "".join(letter if letter.isprintable() else _escaped(letter) for letter in text.replace("\\", "\\\\"))
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def write(folder: Path, rows: Iterable[Row], sources: Sequence[str], files: Iterable[str]) -> Counter[str]:
    """Write the table anew. Rows from earlier runs stay, of files that neither lie in `sources` nor are among `files`.

    Returns:
        Rows by code.
    """
    prefixes, shown = tuple(map(cell, sources)), set(map(cell, files))
    kept = (old for old in read(folder) if old.file not in shown and not any(is_in(old.file, up) for up in prefixes))
    table = sorted({*kept, *rows})
    aside = folder / f"{NAME}.new"
    with open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(table)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / NAME)
    return Counter(refused.code for refused in table)


def read(folder: Path) -> list[Row]:
    """The table that is there; empty without one."""
    try:
        with open(folder / NAME, encoding="utf-8", newline="") as file:
            return [Row(*values) for values in list(csv.reader(file))[1:] if len(values) == len(COLUMNS)]
    except FileNotFoundError:
        return []


def is_in(file: str, source: str) -> bool:
    """Whether a path is that of a source, or leads into it."""
    return file == source or file.startswith(source.rstrip("/") + "/")


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file's name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()
