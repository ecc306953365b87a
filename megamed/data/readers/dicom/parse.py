"""Find the data set of a DICOM file and, in it, the place of the pixels, without reading them.

File format: PS3.10, section 7. Files without preamble, and without meta information, are read where their first
elements leave no doubt.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from megamed.data.readers.base import Refusal
from megamed.data.readers.dicom.codes import BIG, DEFLATED, EXPLICIT, IMPLICIT
from megamed.data.readers.dicom.facts import AGAIN

UNDEFINED = 0xFFFFFFFF
_PIXELS = {0x7FE00008, 0x7FE00009, 0x7FE00010}
_INTEGER_PIXELS = 0x7FE00010

# Deflated files are inflated as a whole; beyond this one is a bomb, or nothing that lies in an archive of images.
_MOST_INFLATED = 1 << 30

# A first element that is longer than this is none: (0002,0000), (0008,0000) and those that follow are short.
_LONGEST_FIRST = 1 << 10
_FIRST_GROUPS = (0x0002, 0x0004, 0x0008)


@dataclass(frozen=True)
class Parsed:
    """A header, and where the pixels are.

    Attributes:
        dataset: the elements asked for.
        sop_class: from the data set, else from the meta information; empty where neither has it.
        syntax: transfer syntax.
        offset, length: of the pixels' value; both 0 where there are none.
        whole_numbers: the pixels are Pixel Data, not (Double) Float Pixel Data.
        vr: of the pixels, empty in implicit files.
        size: of the file in bytes.
        available: bytes from `offset` to the end.
        digest: of what lies before `offset`.
        start: the first bytes of the pixels' value.
    """

    dataset: Dataset
    sop_class: str
    syntax: str
    offset: int
    length: int
    whole_numbers: bool
    vr: str
    size: int
    available: int
    digest: str
    start: bytes


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom tells of every fault of a header on the console, with the value; a value may be a name.

    The decoder of JPEG 2000 tells of its own troubles, which become refusals.
    """
    loggers = [logging.getLogger(name) for name in ("pydicom", "openjpeg")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file begins as DICOM does: `DICM` after the preamble, or two plausible elements."""
    return head[128:132] == b"DICM" or _plausible(head)


def digest_of(head: bytes) -> str:
    """What tells one header from another: 16 hex digits."""
    return hashlib.blake2b(head, digest_size=8).hexdigest()


def parse(path: Path, tags: list[int], start_bytes: int = 0) -> Parsed:
    """Read the elements before the pixels.

    Args:
        path: the file.
        tags: which elements are kept; all where empty.
        start_bytes: so many bytes of the pixels' value are read.

    Raises:
        Refusal: not DICOM, cut short, or damaged.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if not looks_like_dicom(file.read(1024)):
            raise Refusal("not-dicom", "this is no DICOM file", "take it out of the folder")
        try:
            with quiet():
                return _parse(file, size, tags, start_bytes)
        except (MemoryError, Refusal):
            raise
        except Exception as error:  # a damaged file makes pydicom raise whatever its bytes lead it to
            if isinstance(error, OSError) and error.errno is not None:  # pydicom's own have no number
                raise
            raise Refusal(
                "unreadable", f"the header is damaged ({type(error).__name__})", AGAIN
            ) from None


def inflate(file: BinaryIO) -> io.BytesIO:
    """The data set of a deflated file (PS3.5, A.5), from where the file stands.

    Raises:
        Refusal: it is damaged, cut short, or too large.
    """
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = engine.decompress(file.read(), _MOST_INFLATED)
    except zlib.error:
        raise Refusal("undecodable", "the deflated data set is damaged", AGAIN) from None
    if engine.unconsumed_tail:
        raise Refusal("too-large", "the deflated data set is larger than 1 GiB", "export it uncompressed")
    if not engine.eof:
        raise Refusal("truncated", "the deflated data set ends early", AGAIN)
    return io.BytesIO(data)


def read_meta(file: BinaryIO) -> Dataset:
    """Read the meta information, group 2, of a file from its start; it then stands at the data set."""
    file.seek(128)
    file.seek(132 if file.read(4) == b"DICM" else 0)
    return read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2, at_top_level=False)


def _parse(file: BinaryIO, size: int, tags: list[int], start_bytes: int) -> Parsed:
    meta = read_meta(file)
    syntax = str(meta.get("TransferSyntaxUID") or "")
    stream: BinaryIO = inflate(file) if syntax == DEFLATED else file
    first = stream.tell()
    if not syntax:
        syntax = _guess_syntax(stream.read(8))
        stream.seek(first)
    expected = first

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        nonlocal expected
        expected = stream.tell() + length
        return tag in _PIXELS

    dataset = read_dataset(stream, syntax == IMPLICIT, syntax != BIG, stop_when=at_pixels, specific_tags=tags)
    at = stream.tell()
    end = stream.seek(0, io.SEEK_END)
    stream.seek(at)
    tag, vr, offset, length = _element(stream.read(12), at, ">" if syntax == BIG else "<")
    if tag not in _PIXELS:
        offset = length = 0
        # An element of undefined length ends where its items do; pydicom fails where they do not.
        if expected != end and expected < UNDEFINED:
            raise Refusal("truncated", "the file ends within its header", AGAIN)
    stream.seek(0)
    head = stream.read(offset)
    return Parsed(
        dataset=dataset,
        sop_class=str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""),
        syntax=syntax,
        offset=offset,
        length=length,
        whole_numbers=tag == _INTEGER_PIXELS,
        vr=vr,
        size=size,
        available=end - offset,
        digest=digest_of(head),
        start=stream.read(start_bytes) if offset else b"",
    )


def _element(head: bytes, at: int, order: str) -> tuple[int, str, int, int]:
    """Tag, VR, where the value begins, and its length, of the element whose first 12 bytes these are."""
    if len(head) < 8:
        return 0, "", 0, 0
    group, element = struct.unpack(f"{order}HH", head[:4])
    tag = group << 16 | element
    if head[4:6] in (b"OB", b"OW", b"UN", b"OF", b"OD"):
        length = struct.unpack(f"{order}L", head[8:12])[0] if len(head) == 12 else 0
        return tag, head[4:6].decode(), at + 12, length
    return tag, "", at + 8, struct.unpack(f"{order}L", head[4:8])[0]


def _guess_syntax(head: bytes) -> str:
    """The transfer syntax of a data set whose file does not say it."""
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    if head[:2] in (b"\x00\x08", b"\x00\x02"):
        return BIG
    return EXPLICIT if explicit else IMPLICIT


def _plausible(head: bytes) -> bool:
    """Whether two elements in ascending order stand at the start, in any of the three encodings."""
    return any(_two_elements(head, order, explicit) for order, explicit in (("<", True), ("<", False), (">", True)))


def _two_elements(head: bytes, order: str, explicit: bool) -> bool:
    at, last = 0, -1
    for _ in range(2):
        if len(head) < at + 12:
            return False
        group, element = struct.unpack_from(f"{order}HH", head, at)
        if group not in _FIRST_GROUPS or (group << 16 | element) <= last:
            return False
        last = group << 16 | element
        vr = head[at + 4 : at + 6]
        if not explicit:
            length, skip = struct.unpack_from(f"{order}L", head, at + 4)[0], 8
        elif not (vr.isalpha() and vr.isupper()):
            return False
        elif vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
            length, skip = struct.unpack_from(f"{order}L", head, at + 8)[0], 12
        else:
            length, skip = struct.unpack_from(f"{order}H", head, at + 6)[0], 8
        if length > _LONGEST_FIRST:
            return False
        at += skip + length
    return True
