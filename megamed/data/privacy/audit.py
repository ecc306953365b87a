"""Looks for identities where none may be: the values that identify in source files, searched for in every byte of what
was made of them.

Which values identify. Every value of these VRs, of public, private and nested elements alike: PN, LO, SH, ST, LT, UT,
UC, UR, AE, UI, DA, DT, TM and AS (and of private elements of unknown VR, where it is text), and the components of
names. Left out are, with the reason:

- UIDs of DICOM's own root 1.2.840.10008: they name classes and encodings, the same in every hospital.
- Values shorter than 4 characters, and digits alone up to 4 ("30", "5.1", "2157"): they stand everywhere by chance. In
  content that is no text (it has zero bytes), values shorter than 6: a gigabyte of voxels or weights has each of them.
- Texts that are also a code string (CS) of the same files ("HEAD"): a code names a kind, not a person.

Numbers (DS, IS and the binary VRs) and codes (CS) are what the training data is made of.

How values are searched for. As UTF-8, Latin-1, UTF-16 and UTF-32, and as JSON writes them; dates also as 2014-04-25. A
value of nothing but digits and dots counts where it stands alone, not within a longer number or a hash. Beside the
plain bytes, what gzip, zip (so also .npz and checkpoints) and Parquet files hold compressed is looked through, and the
names of files and folders.
"""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IDENTIFYING_VRS = frozenset("PN LO SH ST LT UT UC UR AE UI DA DT TM AS UN".split())
MIN_CHARACTERS = 4
MIN_DIGITS = 5

_DICOM_ROOT = "1.2.840.10008."
# Bytes that are looked through at once; a value that spans two stretches is found in the overlap.
_STRETCH = 1 << 22
# Longer values are pixels; text is at most 10,240 characters long (LT).
_LONGEST_VALUE = 1 << 16
_BY_CHANCE = 6
_NUMERIC = re.compile(r"[\d.]+")
_WORD_BYTES = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.")


@dataclass(frozen=True)
class Hit:
    """An identity that was found.

    Attributes:
        value: what was searched for.
        path: the file.
        place: where in it: a byte offset, with the archive's member or the column in front where there is one.
    """

    value: str
    path: Path
    place: str


def identifying_values(paths: Iterable[Path]) -> set[str]:
    """The values that identify in DICOM files, by the rule above; files that are no DICOM have none."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    values: set[str] = set()
    codes: set[str] = set()
    seen: set[tuple[Any, ...]] = set()
    for path in paths:
        try:
            dataset = pydicom.dcmread(path, defer_size=_LONGEST_VALUE)
        except (InvalidDicomError, EOFError):
            continue
        for element in (*_elements(dataset.file_meta, seen), *_elements(dataset, seen)):
            if element.VR == "CS":
                codes.update(_texts(element.value))
            elif element.VR in IDENTIFYING_VRS:
                for text in _texts(element.value):
                    values.update(_with_parts(text) if element.VR == "PN" else (text,))
    return {value for value in values - codes if _identifies(value)}


def _elements(dataset: Any, seen: set[tuple[Any, ...]]) -> Iterator[Any]:
    """Elements of a data set and of those in it, but for those that another file had with the same bytes."""
    for tag in dataset.keys():
        raw = dataset.get_item(tag)
        if isinstance(raw.value, bytes | None):  # not decoded yet, None where it was too long to be read
            key = (tag, raw.VR, raw.value)
            if raw.value is None or len(raw.value) > _LONGEST_VALUE or key in seen:
                continue
            seen.add(key)
        element = dataset[tag]
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item, seen)
        else:
            yield element


def find_identity(values: Iterable[str], paths: Iterable[Path]) -> list[Hit]:
    """Where values stand in files, looked through as the module's text says.

    Args:
        values: what to search for; at least 4 characters each.
        paths: files, and folders with all that is in them.
    """
    needles = _Needles(values)
    hits = []
    for root in paths:
        for path in [root, *sorted(root.rglob("*"))] if root.is_dir() else [root]:
            name = path.relative_to(root.parent).as_posix().encode(errors="surrogateescape")
            hits += [Hit(value, path, "name") for value, _ in needles.find(name)]
            if path.is_file():
                for part, content in _contents(path):
                    hits += [Hit(value, path, f"{part}{offset}") for value, offset in needles.find(content)]
    return hits


class _Needles:
    """Many byte strings, searched for at once: the first 4 bytes of each position are looked up in a table."""

    def __init__(self, values: Iterable[str]):
        self._by_head: dict[int, list[tuple[bytes, str, bool]]] = defaultdict(list)
        for value in set(values):
            numeric = _NUMERIC.fullmatch(value) is not None
            for form in {encoded for text in _forms(value) for encoded in _encodings(text)}:
                self._by_head[int.from_bytes(form[:4], "little")].append((form, value, numeric))
        self._longest = max((len(form) for entries in self._by_head.values() for form, _, _ in entries), default=0)
        self._heads = np.array(sorted(self._by_head), dtype=np.uint32)
        self._may_start = np.zeros(1 << 20, dtype=bool)
        self._may_start[_bucket(self._heads)] = True

    def find(self, content: bytes) -> Iterator[tuple[str, int]]:
        """Each value that is there, once, with the offset of its first place."""
        seen = set()
        shortest = MIN_CHARACTERS if b"\0" not in content else _BY_CHANCE
        for start in range(0, len(content), _STRETCH):
            stretch = np.frombuffer(content[start : start + _STRETCH + self._longest], dtype=np.uint8)
            if len(stretch) < 4:
                continue
            heads = stretch[:-3].astype(np.uint32)
            for i in range(1, 4):
                heads |= stretch[i : len(stretch) - 3 + i].astype(np.uint32) << np.uint32(8 * i)
            places = np.flatnonzero(self._may_start[_bucket(heads)])
            for place in places[np.isin(heads[places], self._heads)].tolist():
                offset = start + place
                for form, value, numeric in self._by_head[int(heads[place])]:
                    if value in seen or len(value) < shortest or not content.startswith(form, offset):
                        continue
                    if numeric and _in_word(content, offset, offset + len(form)):
                        continue
                    seen.add(value)
                    yield value, offset


def _bucket(heads: np.ndarray) -> np.ndarray:
    """20 bits of a multiplicative hash (Knuth, The Art of Computer Programming, 6.4), modulo 2**32."""
    return (heads * np.uint32(2654435761)) >> np.uint32(12)


def _in_word(content: bytes, start: int, end: int) -> bool:
    neighbours = content[max(start - 1, 0) : start] + content[end : end + 1]
    return any(byte in _WORD_BYTES for byte in neighbours)


def _contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file's bytes, and what it holds compressed."""
    content = path.read_bytes()
    yield "", content
    if content[:2] == b"\x1f\x8b":
        yield "gzip:", gzip.decompress(content)
    elif content[:4] == b"PAR1":
        yield from _parquet_texts(path)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    yield f"{info.filename}:", archive.read(info)
    elif content[:1] == b"\x78":
        try:
            yield "zlib:", zlib.decompress(content)
        except zlib.error:
            return


def _parquet_texts(path: Path) -> Iterator[tuple[str, bytes]]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    for name in table.column_names:
        texts = (str(value) for value in table.column(name).to_pylist() if value is not None)
        yield f"{name}:", "\n".join(texts).encode(errors="surrogatepass")
    yield "metadata:", repr(table.schema.metadata).encode()


def _texts(value: Any) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, bytes):
        text = value.strip(b" \0")
        if text and all(32 <= byte < 127 for byte in text):
            yield text.decode("ascii")
    elif isinstance(value, list | tuple) or type(value).__name__ == "MultiValue":
        for item in value:
            yield from _texts(item)
    elif not isinstance(value, int | float) and str(value).strip(" \0"):
        yield str(value).strip(" \0")


def _with_parts(name: str) -> Iterator[str]:
    yield name
    for group in name.split("="):
        yield group
        yield from group.split("^")


def _identifies(value: str) -> bool:
    if value.startswith(_DICOM_ROOT) or len(value) < MIN_CHARACTERS:
        return False
    return sum(character.isdigit() for character in value) >= MIN_DIGITS or _NUMERIC.fullmatch(value) is None


def _forms(value: str) -> set[str]:
    """A value as it may be written elsewhere."""
    forms = {value, value.encode("ascii", "backslashreplace").decode()}
    if re.fullmatch(r"\d{8}", value):
        forms.add(f"{value[:4]}-{value[4:6]}-{value[6:]}")
    # JSON's form of what is beyond ASCII is that of UTF-16.
    units = np.frombuffer(value.encode("utf-16-le", "surrogatepass"), dtype="<u2")
    forms.add("".join(chr(unit) if 32 <= unit < 127 else f"\\u{unit:04x}" for unit in units.tolist()))
    return forms


def _encodings(text: str) -> Iterator[bytes]:
    for encoding in ("utf-8", "utf-16-le", "utf-32-le"):
        yield text.encode(encoding, "surrogatepass")
    if all(ord(character) < 256 for character in text):
        yield text.encode("latin-1")
