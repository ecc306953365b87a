"""Files that say, or are, far more than they look: one of each kind."""

import bz2
import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, partial

import nibabel
import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian


@cache
def _zeros() -> bytes:
    """16 MiB of nothing, deflated at the lowest level so that it stands alone, and any number of times."""
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    return packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)


def saved(dataset: Dataset, number: int = 777_000_000) -> bytes:
    """A DICOM file whose study, series, object and accession are of a number of nine digits."""
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for part, name in enumerate(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")):
        setattr(dataset, name, f"1.2.826.0.1.{number}.{part}")
    dataset.AccessionNumber = f"{number}"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    file = io.BytesIO()
    syntax = dataset.file_meta.TransferSyntaxUID
    dataset.save_as(file, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian,
                    enforce_file_format=True)
    return file.getvalue()


def deflated(content: bytes, more: int = 0) -> bytes:
    """A DICOM file with its data set deflated, and 16 MiB of nothing behind it so many times."""
    at = 144 + struct.unpack_from("<L", content, 140)[0]
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    return content[:at] + packer.compress(content[at:]) + packer.flush(zlib.Z_FULL_FLUSH) + _zeros() * more + b"\3\0"


def _lying(file: str, number: int, **header: int) -> bytes:
    dataset = pydicom.dcmread(str(get_testdata_file(file)))
    if "MR" not in file and "CT" not in file:  # a picture of a screen, which is refused as such; so a photograph
        dataset.SOPClassUID, dataset.BurnedInAnnotation = "1.2.840.10008.5.1.4.1.1.77.1.4", "NO"
    for name, value in header.items():
        setattr(dataset, name, value)
    return saved(dataset, number)


def _lying_stream(file: str, number: int, marker: bytes, offset: int, form: str) -> bytes:
    """Header and compressed stream agree on 60,000 x 60,000."""
    content = bytearray(_lying(file, number, Rows=60_000, Columns=60_000))
    struct.pack_into(form, content, content.rindex(marker) + offset, 60_000, 60_000)
    return bytes(content)


def _deflated() -> bytes:
    """A gigabyte behind the pixels of a file of a megabyte."""
    content = _lying("MR_small.dcm", 888_000_001).replace(b"UI\x14\x001.2.840.10008.1.2.1\0",
                                                          b"UI\x16\x001.2.840.10008.1.2.1.99")
    length = struct.unpack_from("<L", content, 140)[0] + 2
    return deflated(content[:140] + struct.pack("<L", length) + content[144:], 66)


def nifti(*dim: int) -> bytes:
    """The header of an image of float32."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float32)
    content = bytearray(header.binaryblock + bytes(4))
    struct.pack_into("<8h", content, 40, len(dim), *dim, *[1] * (7 - len(dim)))
    struct.pack_into("<f", content, 108, 352.0)
    content[344:348] = b"n+1\0"
    return bytes(content)


def _gz(head: bytes, blocks: int) -> bytes:
    """A header and 16 MiB of nothing so many times; without the checksum, which nobody gets to."""
    packer = zlib.compressobj(1, wbits=31)
    return packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + _zeros() * blocks + b"\3\0" + bytes(8)


def _png(width: int, height: int, num_blocks: int) -> bytes:
    packer = zlib.compressobj(1)
    data = packer.flush(zlib.Z_FULL_FLUSH) + _zeros() * num_blocks + b"\3\0" + bytes(4)
    chunks = [b"IHDR" + struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + data, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(chunk) - 4) + chunk + struct.pack(">L", zlib.crc32(chunk)) for chunk in chunks
    )


def _zip(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _nested(depth: int) -> bytes:
    inner = _zip(("a.dcm", _lying("MR_small.dcm", 888_000_002)))
    for level in range(depth):
        inner = _zip((f"{level}.zip", inner))
    return inner


def _overlapping() -> bytes:
    """A thousand entries of the directory that are the same data."""
    content = _zip(("0000.dcm", _lying("MR_small.dcm", 888_000_003)))
    at, end = content.find(b"PK\x01\x02"), content.find(b"PK\x05\x06")
    entries = b"".join(content[at:end].replace(b"0000.dcm", b"%04d.dcm" % i) for i in range(1000))
    return content[:at] + entries + content[end : end + 8] + struct.pack("<HHLLH", 1000, 1000, len(entries), at, 0)


def _countless() -> bytes:
    """In an archive of 150 kB one whose directory has two million entries, 100 MB of them."""
    inner = _zip(("a", b""))
    at, end = inner.find(b"PK\x01\x02"), inner.find(b"PK\x05\x06")
    entries = inner[at:end] * 2_000_000
    locator = struct.pack("<LQ2HLL4Q", 0x06064B50, 44, 45, 45, 0, 0, 2_000_000, 2_000_000, len(entries), at)
    locator += struct.pack("<LLQL", 0x07064B50, 0, at + len(entries), 1)
    locator += struct.pack("<L4HLLH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return _zip(("inner.zip", inner[:at] + entries + locator))


def _lying_zip() -> bytes:
    """A member that says that it is small."""
    content = bytearray(_zip(("a.nii", bytes(64 << 20))))
    for magic, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<L", content, content.find(magic) + offset, 1000)
    return bytes(content)


def _damaged_zip() -> bytes:
    content = _zip(*((f"{i}.dcm", _lying("MR_small.dcm", 888_000_010 + i)) for i in range(4)))
    return content[:2000] + bytes(50) + content[2050:]


BOMBS: dict[str, Callable[[], bytes]] = {
    "rows.dcm": partial(_lying, "CT_small.dcm", 888_100_000, Rows=60_000, Columns=60_000),
    "frames.dcm": partial(_lying, "MR_small.dcm", 888_100_001, NumberOfFrames=2**31 - 1),
    "rle.dcm": partial(_lying, "MR_small_RLE.dcm", 888_100_002, Rows=60_000, Columns=60_000),
    "jpeg.dcm": partial(_lying_stream, "JPEG-lossy.dcm", 888_100_003, b"\xff\xc1\0\x0b", 5, ">HH"),
    "jls.dcm": partial(_lying_stream, "MR_small_jpeg_ls_lossless.dcm", 888_100_004, b"\xff\xf7\0\x0b", 5, ">HH"),
    "j2k.dcm": partial(_lying_stream, "MR_small_jp2klossless.dcm", 888_100_005, b"\xff\x4f\xff\x51", 8, ">LL"),
    "deflated.dcm": _deflated,
    "dim.nii": lambda: nifti(30_000, 30_000, 30_000) + bytes(1000),
    "large.nii.gz": lambda: _gz(nifti(740, 740, 740), 97),  # what it says: 405 million voxels
    "longer.nii.gz": lambda: _gz(nifti(64, 64, 64), 64),
    "offset.nii.gz": lambda: _gz(nifti(64, 64, 64)[:108] + struct.pack("<f", 2.0**28) + nifti(64, 64, 64)[112:], 17),
    "twice.nii.gz": lambda: gzip.compress(gzip.compress(nifti(64, 64, 64) + bytes(1 << 22), mtime=0), mtime=0),
    "size.png": lambda: _png(60_000, 60_000, 1),
    "dense.png": lambda: _png(11_000, 11_000, 8),
    "ratio.zip": lambda: _zip(("zeros.nii", bytes(300 << 20))),
    "nested.zip": lambda: _nested(5),
    "overlapping.zip": _overlapping,
    "countless.zip": _countless,
    "lying.zip": _lying_zip,
    "damaged.zip": _damaged_zip,
    "bomb.tar.bz2": lambda: bz2.compress(bytes(64 << 20), 9),
}  # fmt: skip
