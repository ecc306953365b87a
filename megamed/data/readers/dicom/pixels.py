"""Frames of a file as stored numbers, read from where the scan found them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

from megamed.data.readers.base import FileHeader, Refusal
from megamed.data.readers.dicom import codecs, codes
from megamed.data.readers.dicom.facts import AGAIN, Facts
from megamed.data.readers.dicom.parse import digest_of, inflate, parse, quiet, read_meta

_CHANGED = Refusal("changed", "the file is not the one that was scanned", "scan the folder again")
_ITEM, _DELIMITER = 0xFFFEE000, 0xFFFEE0DD


def frames(header: FileHeader, facts: Facts, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Decode frames of a file.

    Yields:
        The number of the frame, and [rows, columns] of stored numbers or [rows, columns, 3] uint8 RGB.

    Raises:
        Refusal: the file has changed since the scan, is cut short, or cannot be decoded.
    """
    try:
        with header.path.open("rb") as file, quiet():
            stream = _data_set(file, facts)
            if facts.syntax in codes.NATIVE:
                yield from _native(stream, facts, wanted)
            else:
                yield from _compressed(stream, facts, wanted)
    except OSError as error:
        reason = f"the file cannot be read ({error.strerror})"
        raise Refusal("unreadable", reason, "check the disk", header.path) from None
    except Refusal as refusal:
        raise Refusal(refusal.code, refusal.reason, refusal.mend, header.path) from None


def colours(picture_HW: np.ndarray, header: FileHeader) -> np.ndarray:
    """RGB, uint8, of a picture with a palette."""
    dataset = _look_up_tables(header)
    try:
        with quiet():
            rgb = apply_color_lut(picture_HW, dataset)
    except MemoryError:
        raise
    except Exception as error:
        raise Refusal("undecodable", f"the palette is damaged ({type(error).__name__})", AGAIN, header.path) from None
    return rgb if rgb.dtype == np.uint8 else (rgb >> 8).astype(np.uint8)


def modality_table(header: FileHeader) -> tuple[int, np.ndarray]:
    """The Modality LUT (PS3.3, C.11.1): the stored number that its first entry is for, and the entries, float64."""
    try:
        with quiet():
            item = _look_up_tables(header).ModalityLUTSequence[0]
            count, first, bits = (int(value) for value in item.LUTDescriptor)
            data = item.LUTData
        if isinstance(data, bytes):
            data = np.frombuffer(data, "<u2" if bits > 8 or len(data) >= 2 * (count or 1 << 16) else "u1")
        table = np.array(data, dtype=np.float64)[: count or 1 << 16]
        if len(table) != (count or 1 << 16):
            raise ValueError("fewer entries than the descriptor says")
    except MemoryError:
        raise
    except Exception as error:
        reason = f"the look-up table is damaged ({type(error).__name__})"
        raise Refusal("undecodable", reason, AGAIN, header.path) from None
    # The first number is signed where the pixels are, which the element's VR may not say.
    signed = Facts.of(header).signed
    return (first - (1 << 16) if signed and first >= 1 << 15 else first), table


def _look_up_tables(header: FileHeader) -> Dataset:
    names = (
        0x00283000, 0x00280100, 0x00280103, 0x00281101, 0x00281102, 0x00281103, 0x00281201, 0x00281202, 0x00281203,
        0x00281221, 0x00281222, 0x00281223,
    )
    return parse(header.path, list(names)).dataset


def _data_set(file: BinaryIO, facts: Facts) -> BinaryIO:
    """The stream that `facts.offset` counts in, at the pixels, after a check that it is what was scanned."""
    if file.seek(0, 2) != facts.size:
        raise _CHANGED
    file.seek(0)
    stream: BinaryIO = file
    if facts.syntax == codes.DEFLATED:
        read_meta(file)
        stream = inflate(file)
    if digest_of(stream.read(facts.offset)) != facts.digest:
        raise _CHANGED
    return stream


def _native(stream: BinaryIO, facts: Facts, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    grid = facts.grid or 1
    rows, columns, size = facts.rows * grid, facts.columns * grid, codecs.frame_bytes(facts)
    order = ">" if facts.syntax == codes.BIG else "<"
    dtype = np.dtype(f"{order}{'i' if facts.signed else 'u'}{facts.allocated // 8}")
    for number in sorted(wanted):
        # A frame of an odd number of bytes in swapped words begins or ends within one.
        start = number * size - (number * size % 2 if facts.swapped else 0)
        stop = (number + 1) * size + ((number + 1) * size % 2 if facts.swapped else 0)
        stream.seek(facts.offset + start)
        data = stream.read(stop - start)
        if len(data) < (stop - start) - (1 if facts.swapped else 0):
            raise Refusal("truncated", "the file has fewer pixels than its header says", AGAIN)
        if facts.swapped:
            data = np.frombuffer(data[: len(data) // 2 * 2], "u2").byteswap().tobytes()[number * size - start :][:size]
        if facts.samples == 1:
            stored = np.frombuffer(data, dtype, rows * columns).reshape(rows, columns)
            yield number, codecs.unused_bits_cleared(stored, facts)
        else:
            yield number, _native_colour(np.frombuffer(data, np.uint8), rows, columns, facts)


def _native_colour(flat: np.ndarray, rows: int, columns: int, facts: Facts) -> np.ndarray:
    if facts.photometric == "YBR_FULL_422":
        # Two pixels share their chroma: Y1 Y2 Cb Cr (PS3.3, C.7.6.3.1.2).
        pairs = flat[: rows * columns * 2].reshape(-1, 4)
        picture = np.stack([pairs[:, [0, 2, 3]], pairs[:, [1, 2, 3]]], axis=1).reshape(rows, columns, 3)
    elif facts.planar == 1:
        picture = flat[: rows * columns * 3].reshape(3, rows, columns).transpose(1, 2, 0)
    else:
        picture = flat[: rows * columns * 3].reshape(rows, columns, 3)
    return codecs.to_rgb(picture, facts.photometric.startswith("YBR_FULL"))


def _compressed(stream: BinaryIO, facts: Facts, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    fragments, offsets = _fragments(stream, facts)
    groups = _frames_of_fragments(stream, fragments, offsets, facts)
    for number in sorted(wanted):
        parts = []
        for at, length in groups[number]:
            stream.seek(at)
            parts.append(stream.read(length))
        yield number, codecs.decode(b"".join(parts), facts)


def _fragments(stream: BinaryIO, facts: Facts) -> tuple[list[tuple[int, int]], list[int]]:
    """Places and lengths of the fragments, and the Basic Offset Table (PS3.5, A.4)."""
    at, end = facts.offset, stream.seek(0, 2)
    if facts.length >= 0:
        end = min(end, at + facts.length)
    found: list[tuple[int, int]] = []
    while at + 8 <= end:
        stream.seek(at)
        group, element, length = struct.unpack("<HHL", stream.read(8))
        tag = group << 16 | element
        if tag == _DELIMITER:
            break
        if tag != _ITEM:
            raise Refusal("undecodable", "compressed pixels that are not in fragments", AGAIN)
        if at + 8 + length > end:
            raise Refusal("truncated", "the file ends within its compressed pixels", AGAIN)
        found.append((at + 8, length))
        at += 8 + length
    else:
        if facts.length < 0:
            raise Refusal("truncated", "the file ends before the end of its compressed pixels", AGAIN)
    if len(found) < 2:
        raise Refusal("truncated", "the file ends before its compressed pixels", AGAIN)
    start, length = found[0]
    stream.seek(start)
    table = stream.read(length // 4 * 4)
    return found[1:], list(struct.unpack(f"<{len(table) // 4}L", table))


def _frames_of_fragments(
    stream: BinaryIO, fragments: list[tuple[int, int]], offsets: list[int], facts: Facts
) -> list[list[tuple[int, int]]]:
    """Which fragments make each frame: one each, or as the table says, or up to the marker that ends a picture."""
    if facts.num_frames == 1:
        return [fragments]
    if len(fragments) == facts.num_frames:
        return [[fragment] for fragment in fragments]
    groups: list[list[tuple[int, int]]] = []
    first = fragments[0][0]
    starts = {first + offset for offset in offsets} if len(offsets) == facts.num_frames else set()
    ended = True
    for at, length in fragments:
        if at in starts or (not starts and ended):
            groups.append([])
        if not groups:
            break
        groups[-1].append((at, length))
        stream.seek(at + max(length - 16, 0))
        ended = b"\xff\xd9" in stream.read(min(length, 16))
    if len(groups) != facts.num_frames:
        raise Refusal("truncated", f"{facts.num_frames} frames, and fragments of {len(groups)}", AGAIN)
    return groups
