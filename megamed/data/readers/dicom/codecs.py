"""Compressed frames as stored numbers.

Which library decodes what was chosen by what it gets right, all of them without copyleft:

| coding | decoder | why |
|---|---|---|
| JPEG baseline, extended (8 and 12 bit), lossless | GDCM | the only one for 12 bit and for lossless |
| JPEG-LS | CharLS (pyjpegls) | GDCM fails at some precisions |
| JPEG 2000, HTJ2K | OpenJPEG (pylibjpeg) | 16 bit and sign as the stream has them; GDCM goes by the header |
| RLE | pylibjpeg-rle | some 20 times as fast as pydicom's own |

The stream says how many bits it has, and is believed: headers are wrong about it in real files. Only JPEG 2000 knows
of a sign; elsewhere the header's PixelRepresentation decides.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import gdcm
import jpeg_ls
import numpy as np
import openjpeg
from rle.utils import decode_frame as decode_rle

from megamed.data.readers.base import Refusal
from megamed.data.readers.dicom import codes
from megamed.data.readers.dicom.facts import AGAIN, Facts

_START_OF_SCAN = 0xDA
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}
_END = b"\xff\xd9"
_START_OF_TILE = b"\xff\x90"
# Within a scan stand restart markers, fill bytes, and 0xFF with a zero behind it.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)

# Behind the end marker stand at most a byte or two of padding; some writers pad more.
_PADDING = 64

gdcm.Trace.DebugOff()
gdcm.Trace.WarningOff()
gdcm.Trace.ErrorOff()


class StreamSize(NamedTuple):
    """What a compressed stream says of itself.

    Attributes:
        rows, columns, samples, bits: of the picture.
        signed: JPEG 2000 alone says it.
        rgb: what the stream says of its colours: True, False (luma and chroma), or None where it says nothing.
    """

    rows: int
    columns: int
    samples: int
    bits: int
    signed: bool | None = None
    rgb: bool | None = None


def frame_bytes(facts: Facts) -> int:
    """Bytes of an uncompressed frame."""
    pixels = facts.rows * facts.columns * (facts.grid or 1) ** 2
    if facts.photometric == "YBR_FULL_422":
        return pixels * 2
    return pixels * facts.samples * facts.allocated // 8


def first_fragment(start: bytes) -> bytes:
    """The beginning of the first fragment behind the Basic Offset Table (PS3.5, A.4), of the pixels' first bytes."""
    if len(start) < 8:
        return b""
    table = struct.unpack_from("<L", start, 4)[0]
    return start[8 + table + 8 :]


def look(stream: bytes, syntax: str) -> StreamSize | None:
    """What a stream says of itself; None where its start is not that of such a stream, or is cut before it says so."""
    try:
        if syntax in codes.JPEG_2000:
            return _look_at_jpeg_2000(stream)
        if syntax in codes.JPEG or syntax in codes.JPEG_LS:
            return _look_at_jpeg(stream)
    except (struct.error, IndexError):
        pass
    return None


def check_size(size: StreamSize, facts: Facts) -> None:
    """The stream is of the size that the header says.

    Raises:
        Refusal: it is not; or has more bits than the header has room for.
    """
    grid = facts.grid or 1
    stated = (facts.rows * grid, facts.columns * grid, facts.samples)
    if (size.rows, size.columns, size.samples) != stated or size.bits > facts.allocated:
        raise Refusal(
            "size-mismatch",
            f"the compressed picture is {size.rows} x {size.columns} x {size.samples} of {size.bits} bits, the header "
            f"says {stated[0]} x {stated[1]} x {stated[2]} of {facts.allocated}",
            AGAIN,
        )


def decode(stream: bytes, facts: Facts) -> np.ndarray:
    """One frame: [rows, columns] of stored numbers, or [rows, columns, 3] uint8 RGB.

    Raises:
        Refusal: the stream is cut short, of another size than the header says, or cannot be decoded.
    """
    if facts.syntax != codes.RLE and _END not in stream[-_PADDING:]:
        raise Refusal("truncated", "a compressed picture without its end", AGAIN)
    try:
        with _silent():
            return _decode(stream, facts)
    except (Refusal, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever damaged streams lead decoders to; a panic of Rust is no Exception
        raise Refusal("undecodable", f"a picture that cannot be decoded ({type(error).__name__})", AGAIN) from None


@contextmanager
def _silent() -> Iterator[None]:
    """The C libraries below the decoders complain to the process's standard error, past Python."""
    kept = os.dup(2)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _decode(stream: bytes, facts: Facts) -> np.ndarray:
    rows, columns = facts.rows * (facts.grid or 1), facts.columns * (facts.grid or 1)
    if facts.syntax == codes.RLE:
        # One segment a byte of a pixel (PS3.5, G.2), which the decoder does not check.
        if stream[:4] != struct.pack("<L", facts.samples * facts.allocated // 8):
            raise Refusal("undecodable", "a picture with another number of segments than its pixels have bytes", AGAIN)
        data = decode_rle(stream, rows * columns, facts.allocated, "<")
        planes = np.frombuffer(data, f"<{'i' if facts.signed else 'u'}{facts.allocated // 8}")
        planes = planes.reshape(facts.samples, rows, columns)
        if facts.samples == 3:
            return to_rgb(planes.transpose(1, 2, 0), facts.photometric.startswith("YBR_FULL"))
        return unused_bits_cleared(planes[0], facts)
    size = look(stream, facts.syntax)
    if size is None:
        raise Refusal("undecodable", "a picture that does not begin as its coding does", AGAIN)
    check_size(size, facts)
    if facts.syntax in codes.JPEG_2000:
        _check_tiles(stream)
        decoded = openjpeg.decode(stream)
    elif facts.syntax in codes.JPEG_LS:
        decoded = _jpeg_ls(stream, size)
    else:
        _check_scans(stream)
        decoded = _jpeg(stream, size, facts.syntax)
    if decoded.shape[:2] != (rows, columns):
        raise Refusal("undecodable", "a picture that decodes to another size", AGAIN)
    if size.samples == 3:
        luma = facts.photometric.startswith("YBR_FULL") if size.rgb is None else not size.rgb
        return to_rgb(decoded, luma and facts.syntax not in codes.JPEG_2000)
    return _with_sign(decoded, size, facts.signed)


def to_rgb(picture_HWC: np.ndarray, luma: bool) -> np.ndarray:
    """RGB of a picture in RGB or, if `luma`, in YBR_FULL (PS3.3, C.7.6.3.1.2: ITU-R BT.601, full range)."""
    if not luma:
        return np.ascontiguousarray(picture_HWC)
    y, blue, red = (picture_HWC[..., c].astype(np.float32) for c in range(3))
    blue, red = blue - 128, red - 128
    rgb = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=-1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def unused_bits_cleared(stored_HW: np.ndarray, facts: Facts) -> np.ndarray:
    """Numbers of `stored` bits; what lies in the other bits of a word (an overlay, once) does not count."""
    low, high = stored_range(facts)
    shift = facts.high_bit + 1 - facts.stored
    if not shift and stored_HW.min() >= low and stored_HW.max() <= high:
        return stored_HW
    # To the top, which drops what is above, and back, which drops what is below and keeps the sign.
    return (stored_HW << (facts.allocated - 1 - facts.high_bit)) >> (facts.allocated - facts.stored)


def stored_range(facts: Facts) -> tuple[int, int]:
    """Lowest and highest number that the stored bits can hold."""
    if facts.signed:
        return -(1 << (facts.stored - 1)), (1 << (facts.stored - 1)) - 1
    return 0, (1 << facts.stored) - 1


def _with_sign(decoded_HW: np.ndarray, size: StreamSize, signed: bool) -> np.ndarray:
    """Decoded numbers read with the sign of the header, of as many bits as the stream has."""
    if bool(size.signed) == signed:
        return decoded_HW
    unused = 8 * decoded_HW.dtype.itemsize - size.bits
    return (decoded_HW.view(f"{'i' if signed else 'u'}{decoded_HW.dtype.itemsize}") << unused) >> unused


def _jpeg_ls(stream: bytes, size: StreamSize) -> np.ndarray:
    data, info = jpeg_ls.decode_pixel_data(stream)
    flat = np.frombuffer(data, np.uint8 if info["bits_per_sample"] <= 8 else np.uint16)
    if size.samples == 1:
        return flat.reshape(size.rows, size.columns)
    if info["interleave_mode"] == 0:
        return flat.reshape(3, size.rows, size.columns).transpose(1, 2, 0)
    return flat.reshape(size.rows, size.columns, 3)


def _jpeg(stream: bytes, size: StreamSize, syntax: str) -> np.ndarray:
    """By GDCM, which takes a whole image apart into fragments and format; colours come as they are in the stream."""
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((size.columns, size.rows, 1))
    image.SetDataElement(element)
    colour = "MONOCHROME2" if size.samples == 1 else "YBR_FULL"
    photometric = gdcm.PhotometricInterpretation.GetPIType(colour)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(photometric))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    # The allocated bits choose the decoder: with 16 for a stream of 12 it complains on the console, then finds it.
    allocated = 8 if size.bits <= 8 else 12 if size.bits <= 12 else 16
    image.SetPixelFormat(gdcm.PixelFormat(size.samples, allocated, size.bits, size.bits - 1, 0))
    data = image.GetBuffer().encode("utf-8", "surrogateescape")
    flat = np.frombuffer(data, np.uint8 if size.bits <= 8 else np.uint16)
    shape = (size.rows, size.columns) if size.samples == 1 else (size.rows, size.columns, size.samples)
    # An odd number of bytes has a byte of padding.
    return flat[: int(np.prod(shape))].reshape(shape)


def _look_at_jpeg(stream: bytes) -> StreamSize | None:
    """Walk the markers of JPEG and JPEG-LS (ISO 10918-1, B.2; ISO 14495-1, C) to the start of the frame."""
    if stream[:2] != b"\xff\xd8":
        return None
    at, rgb = 2, None
    while stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = struct.unpack_from(">H", stream, at + 2)[0]
        if marker in _START_OF_FRAME:
            bits, rows, columns, samples = struct.unpack_from(">BHHB", stream, at + 4)
            identifiers = bytes(stream[at + 10 + 3 * i] for i in range(samples))
            if identifiers.upper() == b"RGB":
                rgb = True
            return StreamSize(rows, columns, samples, bits, rgb=rgb)
        body = stream[at + 4 : at + 2 + length]
        if marker == 0xE0 and body.startswith(b"JFIF"):
            rgb = False
        # Adobe's transform 0 means that nothing was done to the colours, so the header decides.
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12 and body[11] == 1:
            rgb = False
        at += 2 + length
    return None


def _look_at_jpeg_2000(stream: bytes) -> StreamSize | None:
    """The SIZ segment (ISO 15444-1, A.5.1), within the boxes of a JP2 file where there are some."""
    at = _codestream(stream)
    if stream[at : at + 4] != b"\xff\x4f\xff\x51":
        return None
    columns, rows, left, top = struct.unpack_from(">4L", stream, at + 8)
    samples, bits = struct.unpack_from(">HB", stream, at + 40)
    return StreamSize(rows - top, columns - left, samples, (bits & 0x7F) + 1, signed=bool(bits & 0x80))


def _codestream(stream: bytes) -> int:
    """Where JPEG 2000 begins."""
    return stream.find(b"jp2c") + 4 if stream.startswith(b"\x00\x00\x00\x0cjP  ") else 0


def _check_tiles(stream: bytes) -> None:
    """Walk the tile-parts (ISO 15444-1, A.4.2): OpenJPEG leaves tiles that are not there empty, and says nothing.

    Raises:
        Refusal: a tile is missing, or cut.
    """
    at = _codestream(stream)
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8L", stream, at + 8)
    wanted = -(-(right - left) // width) * -(-(bottom - top) // height)
    at += 2
    while stream[at : at + 2] != _START_OF_TILE:
        at += 2 + struct.unpack_from(">H", stream, at + 2)[0]
    tiles = set()
    while stream[at : at + 2] == _START_OF_TILE:
        tile, length = struct.unpack_from(">HL", stream, at + 4)
        tiles.add(tile)
        at += length or len(stream) - at  # the last one may leave its length open
    if tiles != set(range(wanted)) or at > len(stream):
        raise Refusal("truncated", "a compressed picture without some of its tiles", AGAIN)


def _check_scans(stream: bytes) -> None:
    """Walk the scans (ISO 10918-1, B.2.3): of a component that is in none, GDCM returns what was in memory before.

    Raises:
        Refusal: a component is in no scan.
    """
    wanted: set[int] = set()
    scanned: set[int] = set()
    at = 2
    while (found := _MARKER.search(stream, at)) and stream[found.start() + 1] != _END[1]:
        at, marker = found.end(), stream[found.start() + 1]
        if marker in _START_OF_FRAME:
            wanted.update(stream[at + 8 : at + 8 + 3 * stream[at + 7] : 3])
        elif marker == _START_OF_SCAN:
            scanned.update(stream[at + 3 : at + 3 + 2 * stream[at + 2] : 2])
        at += struct.unpack_from(">H", stream, at)[0]
    if wanted != scanned:
        raise Refusal("undecodable", "a compressed picture without some of its colours", AGAIN)
