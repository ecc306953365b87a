"""Damaged, lying and malicious files, made from sound ones; always the same ones for a seed.

    for mutant in mutants(2000, seed=0): (folder / mutant.name).write_bytes(mutant.content)
"""

import gzip
import io
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import RLELossless

from tests.data.ingest.bombs import BOMBS, deflated, saved
from tests.data.readers.dicom_files import compress, enhanced, frame

# Slices that pydicom brings: native in every byte order, RLE, JPEG-LS, JPEG 2000, and with something behind the pixels.
_SLICES = (
    "MR_small.dcm", "CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_padded.dcm",
    "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm",
)  # fmt: skip
# Pictures of screens, which are refused as such; here they are made photographs. JPEG baseline, extended, lossless;
# RLE, JPEG-LS and JPEG 2000 in colour; native with an odd number of bytes.
_PICTURES = (
    "SC_rgb_jpeg_dcmtk.dcm", "JPGExtended.dcm", "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm", "SC_rgb_jls_lossy_sample.dcm",
    "JPEGLSNearLossless_16.dcm", "JPEG2000.dcm", "SC_rgb_small_odd.dcm",
)  # fmt: skip
_PHOTOGRAPH = "1.2.840.10008.5.1.4.1.1.77.1.4"
DEFLATED, FRAMES, FRAMES_RLE = "MR_small_deflated.dcm", "frames.dcm", "frames_RLE.dcm"
DICOM = (*_SLICES, *_PICTURES, DEFLATED, FRAMES, FRAMES_RLE)
NIFTI = ("functional.nii", "anatomical.nii", "example_nifti2.nii.gz", "run.nii.gz")
PICTURES = (
    "gray.png", "gray16.png", "rgb.png", "gray.jpg", "rgb.jpg", "gray16.tif", "rgb_lzw.tif", "rgb.bmp", "gray.gif",
    "rgb.webp", "gray.jp2",
)  # fmt: skip
# What UIDs and the accession number of a sound file hold, and what its number takes the place of.
_MARK = b"777000000"

_SIZES = (0, 1, 2, 3, 7, 255, 256, 4096, 60000, 32767, 32768, 65535)
_LENGTHS = (0, 1, 2, 100, 60000, 65534, 1 << 20, 0x7FFFFFFE, 0xFFFFFFFE, 0xFFFFFFFF)
# Rows, Columns, SamplesPerPixel, PlanarConfiguration, BitsAllocated, BitsStored, HighBit, PixelRepresentation.
_LAYOUT = (0x10, 0x11, 0x02, 0x06, 0x100, 0x101, 0x102, 0x103)
_ITEM = b"\xfe\xff\x00\xe0"


@dataclass(frozen=True)
class Mutant:
    """A file.

    Attributes:
        name: of the file; ends as the seed's does.
        kind: what was done to it.
        seed: the sound file's name; empty for bombs.
        content: of it.
    """

    name: str
    kind: str
    seed: str
    content: bytes


def sound(seed: str, number: int) -> bytes:
    """A sound file; those of formats with identifiers, or with room for a text, differ by their number."""
    content, own = _seeds()[seed], b"777%06d" % number
    if seed == DEFLATED:
        return deflated(content.replace(_MARK, own))
    if seed in DICOM:
        return content.replace(_MARK, own)
    return _in_gzip(seed, lambda plain: plain.replace(_MARK, own)) if seed in NIFTI else content


def mutants(count: int, seed: int) -> Iterator[Mutant]:
    """So many files, bombs among them."""
    rng, bombs, seeds = random.Random(seed), list(BOMBS.items()), [*DICOM, *NIFTI, *PICTURES]
    for number in range(count):
        # Bombs lie among the others, a few dozen files apart.
        turn, rest = divmod(number, max(count // len(bombs), 1))
        if rest == 0 and turn < len(bombs):
            kind, make = bombs[turn]
            yield Mutant(f"{number:04d}_{kind}", "bomb", "", make())
            continue
        name, kind = seeds[number % len(seeds)], rng.choice(list(MUTATIONS))
        content = MUTATIONS[kind](rng, sound(name, number), name)
        yield Mutant(f"{number:04d}_{kind}_{name}", kind, name, content)


def _truncated(rng: random.Random, content: bytes, name: str) -> bytes:
    """Most often within the pixels, which are most of a file; else in what stands at the end."""
    return content[: -rng.randint(1, 16) if rng.random() < 0.2 else rng.randrange(len(content))]


def _flipped(rng: random.Random, content: bytes, name: str) -> bytes:
    """A few bits, anywhere."""
    return _with_flips(rng, content, 0, len(content))


def _flipped_header(rng: random.Random, content: bytes, name: str) -> bytes:
    return _with_flips(rng, content, 128 if name in DICOM else 0, min(len(content), 2048))


def _flipped_pixels(rng: random.Random, content: bytes, name: str) -> bytes:
    return _with_flips(rng, content, len(content) // 2, len(content))


def _with_flips(rng: random.Random, content: bytes, start: int, end: int) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 32))):
        damaged[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _overwritten(rng: random.Random, content: bytes, name: str) -> bytes:
    start, length = rng.randrange(len(content)), rng.choice((1, 4, 64, 1024))
    block = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return (content[:start] + block + content[start + length :])[: len(content)]


def _spliced(rng: random.Random, content: bytes, name: str) -> bytes:
    """A stretch is there twice, or not at all."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 2, 16, 512, 8192)))
    return content[:end] + content[start:] if rng.random() < 0.5 else content[:start] + content[end:]


def _lying(rng: random.Random, content: bytes, name: str) -> bytes:
    """A number in the header that is not so."""
    if name in DICOM:
        return rng.choice((_lying_layout, _lying_layout, _lying_frames, _lying_length, _lying_stream))(
            rng, content, name
        )
    return _lying_nifti(rng, content, name) if name in NIFTI else _lying_picture(rng, content, name)


MUTATIONS: dict[str, Callable[[random.Random, bytes, str], bytes]] = {
    "truncated": _truncated, "flipped": _flipped, "header": _flipped_header, "pixels": _flipped_pixels,
    "overwritten": _overwritten, "spliced": _spliced, "lying": _lying, "lying2": _lying,
}  # fmt: skip


def _in_dataset(name: str, content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Change bytes of a DICOM file, in the data set also where that is deflated."""
    if name != DEFLATED:
        return change(content)
    at = 144 + struct.unpack_from("<L", content, 140)[0]
    return deflated(content[:at] + change(zlib.decompress(content[at:], -zlib.MAX_WBITS)))


def _lying_layout(rng: random.Random, content: bytes, name: str) -> bytes:
    element, value = rng.choice(_LAYOUT), rng.choice((*_SIZES, 1, 8, 12, 16, 32, 64))

    def lie(data: bytes) -> bytes:
        for order, explicit in (("<", True), ("<", False), (">", True)):
            length = b"US" + struct.pack(f"{order}H", 2) if explicit else struct.pack(f"{order}L", 2)
            start = struct.pack(f"{order}HH", 0x28, element) + length
            if (at := data.find(start) + len(start)) >= len(start):
                return _put(data, at, f"{order}H", value)
        return data

    return _in_dataset(name, content, lie)


def _lying_frames(rng: random.Random, content: bytes, name: str) -> bytes:
    """NumberOfFrames: another one where there is one, else one in the place of SamplesPerPixel."""
    text = rng.choice((b"0 ", b"1 ", b"3 ", b"8 ", b"-1", b"99"))
    lie = b"\x28\0\x08\0IS\x02\0" + text
    return _in_dataset(name, content, lambda data: re.sub(
        rb"\x28\0\x08\0IS\x02\0..|\x28\0\x02\0US\x02\0..", lambda _: lie, data, count=1, flags=re.DOTALL))  # fmt: skip


def _lying_length(rng: random.Random, content: bytes, name: str) -> bytes:
    """The length of some element, or of a fragment of the pixels."""
    if name == DEFLATED:
        return _lying_layout(rng, content, name)
    big, values = name == "MR_small_bigendian.dcm", _places(name)
    at, is_long = rng.choice(values[-4:]) if rng.random() < 0.5 else rng.choice(values)
    length = rng.choice(_LENGTHS)
    return _put(content, at - 4, ">L" if big else "<L", length) if is_long else _put(
        content, at - 2, ">H" if big else "<H", length & 0xFFFF)  # fmt: skip


@cache
def _places(name: str) -> list[tuple[int, bool]]:
    """Where values of a seed's elements begin, fragments last, and whether their lengths have 32 bits."""
    content = _seeds()[name]
    dataset = pydicom.dcmread(io.BytesIO(content))
    found = []
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag)
        at = getattr(element, "value_tell", 0) or 0
        if at:
            is_long = dataset.original_encoding[0] or str(element.VR) in ("OB", "OW", "SQ", "UN", "UT", "UC")
            found.append((at, bool(is_long)))
    pixels = content.find(b"\xe0\x7f\x10\0O")
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        found += [(match.end() + 4, True) for match in re.finditer(re.escape(_ITEM), content) if match.start() > pixels]
    return found


def _lying_stream(rng: random.Random, content: bytes, name: str) -> bytes:
    """What a compressed picture says of itself: sizes and samples of JPEG, JPEG-LS and JPEG 2000, segments of RLE."""
    if (at := content.find(b"\xff\x4f\xff\x51")) > 0:  # SIZ: eight sizes, number of components, depth
        field = rng.randrange(9)
        return _put(content, at + 8 + 4 * field, ">H" if field == 8 else ">L",
                    rng.choice((*_SIZES, 1 << 31, (1 << 32) - 1)) & (0xFFFF if field == 8 else 0xFFFFFFFF))  # fmt: skip
    if "RLE" in name or "rle" in name:
        last = _places(name)[-1][0]
        return _put(content, last + 4 * rng.randrange(4), "<L", rng.choice((*_SIZES, 1 << 31, (1 << 32) - 1)))
    frames = [content.find(bytes((0xFF, marker, 0))) for marker in (0xC0, 0xC1, 0xC3, 0xF7)]
    at = max(frames)
    return _lying_sof(rng, content, at) if at > 0 else _lying_layout(rng, content, name)


def _lying_sof(rng: random.Random, content: bytes, at: int) -> bytes:
    """Precision, lines, samples a line, components, behind the marker's length (ISO 10918-1, B.2.2)."""
    offset, form = rng.choice(((4, "B"), (5, ">H"), (7, ">H"), (9, "B")))
    value = rng.choice(_SIZES)
    return _put(content, at + offset, form, value & 0xFF if form == "B" else value)


def _lying_nifti(rng: random.Random, content: bytes, name: str) -> bytes:
    def lie(plain: bytes) -> bytes:
        order = "<" if plain[0] else ">"
        if b"n+2" not in plain[:8]:  # dim, pixdim; datatype, bitpix, vox_offset, scl, forms
            fields = [(40 + 2 * i, "<h") for i in range(8)] + [(76 + 4 * i, "<f") for i in range(8)]
            fields += [(70, "<h"), (72, "<h"), (108, "<f"), (112, "<f"), (116, "<f"), (252, "<h"), (254, "<h"),
                       (280, "<f")]  # fmt: skip
        else:
            fields = [(16 + 8 * i, "<q") for i in range(8)] + [(104 + 8 * i, "<d") for i in range(8)]
            fields += [(12, "<h"), (14, "<h"), (168, "<q"), (176, "<d"), (184, "<d"), (344, "<i"), (348, "<i")]
        offset, form = rng.choice(fields)
        numbers: list[float] = [0, 1, -1, 2, 3, 4, 8, 16, 64, 255, 512, 1024, 30000, -32768]
        if form in ("<f", "<d"):
            numbers += [float("nan"), float("inf"), 1e30, -1e30, 1e-30]
        elif form == "<q":
            numbers += [1 << 40, -(1 << 40)]
        return _put(plain, offset, form.replace("<", order), rng.choice(numbers))

    return gzip.compress(lie(gzip.decompress(content)), 1, mtime=0) if name.endswith(".gz") else lie(content)


def _lying_picture(rng: random.Random, content: bytes, name: str) -> bytes:
    value, kind = rng.choice((*_SIZES, 1 << 20, (1 << 31) - 1)), name[-3:]
    if kind == "png":  # IHDR: width, height, depth, colour, interlace
        offset, form = rng.choice(((4, ">L"), (8, ">L"), (12, "B"), (13, "B"), (16, "B")))
        head = _put(content[12:29], offset, form, value & 0xFF if form == "B" else value)
        return content[:12] + head + struct.pack(">L", zlib.crc32(head)) + content[33:]
    if kind == "jpg":
        return _lying_sof(rng, content, content.find(b"\xff\xc0"))
    if kind == "tif":  # width, length, bits, compression, photometric, offsets, samples, rows a strip, bytes, planar
        tag = struct.pack("<H", rng.choice((256, 257, 258, 259, 262, 273, 277, 278, 279, 284)))
        first = struct.unpack_from("<L", content, 4)[0]
        at = next((at for at in range(first + 2, len(content) - 12, 12) if content[at : at + 2] == tag), first + 2)
        return _put(content, at + rng.choice((4, 8)), "<L", value)
    if kind == "bmp":
        return _put(content, rng.choice((10, 18, 22)), "<L", value)
    if kind == "gif":
        return _put(content, rng.choice((6, 8)), "<H", value & 0xFFFF)
    at = content.find(b"\xff\x4f\xff\x51") + 8 if kind == "jp2" else 4
    return _put(content, at + 4 * rng.randrange(4), ">L", value)


def _put(content: bytes, at: int, form: str, value: float) -> bytes:
    packed = struct.pack(form, value)
    return content[:at] + packed + content[at + len(packed) :]


def _in_gzip(name: str, change: Callable[[bytes], bytes]) -> bytes:
    """A NIfTI seed, changed; compressed where its name says so."""
    plain = change(_seeds()[name])
    return gzip.compress(plain, 1, mtime=0) if name.endswith(".gz") else plain


@cache
def _seeds() -> dict[str, bytes]:
    """By name; of what is compressed as a whole, the content."""
    found = {name: _dicom(name) for name in (*_SLICES, *_PICTURES)}
    found[DEFLATED] = found["MR_small.dcm"].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    length = struct.unpack_from("<L", found[DEFLATED], 140)[0] + 2
    at = found[DEFLATED].find(b"\x02\0\x10\0UI")
    found[DEFLATED] = _put(_put(found[DEFLATED], 140, "<L", length), at + 6, "<H", 22)
    stored = [np.add.outer(np.arange(40), 7 * np.arange(30)) + 1000 * z for z in range(6)]
    found[FRAMES] = saved(enhanced([frame(z) for z in range(6)], stored))
    found[FRAMES_RLE] = saved(compress(enhanced([frame(z) for z in range(6)], stored), RLELossless))
    folder = Path(nibabel.__file__).parent / "tests" / "data"
    for name in NIFTI[:3]:
        content = (folder / name).read_bytes()
        content = gzip.decompress(content) if name.endswith(".gz") else content
        found[name] = _put_text(content)
    found["run.nii.gz"] = found["functional.nii"]
    return found | {name: _picture(name) for name in PICTURES}


def _put_text(nifti: bytes) -> bytes:
    at = 240 if b"n+2" in nifti[:8] else 148  # descrip
    return nifti[:at] + _MARK.ljust(80, b"\0") + nifti[at + 80 :]


def _dicom(name: str) -> bytes:
    dataset = pydicom.dcmread(str(get_testdata_file(name)))
    list(dataset)  # each element gets its VR, which an implicit data set does not have
    if name in _PICTURES:
        dataset.SOPClassUID, dataset.BurnedInAnnotation = _PHOTOGRAPH, "NO"
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            dataset["PixelData"].VR = "OB"
    return saved(dataset)


def _picture(name: str) -> bytes:
    ramp = np.add.outer(np.arange(60), 3 * np.arange(50)).astype(np.uint8)
    pixels = (ramp.astype(np.uint16) << 5) + 7 if "16" in name else ramp
    pixels = np.stack([ramp, ramp[::-1], ramp // 2], axis=-1) if "rgb" in name else pixels
    form = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000", "webp": "WEBP"}.get(name.partition(".")[2], name[-3:])
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=form, **({"compression": "tiff_lzw"} if "lzw" in name else {}))
    return file.getvalue()
