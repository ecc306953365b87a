"""The bytes of a NIfTI file: its header, checked, and its voxels, of which nothing is read beyond what the header says.

NIfTI-1: https://nifti.nimh.nih.gov/nifti-1 (nifti1.h); NIfTI-2: nifti2.h of the same place.

Shape suffixes: X, Y, Z voxel axes, T volumes in time.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from megamed.data.readers import neighbours
from megamed.data.readers.base import Refusal
from megamed.data.voxels import smallest_dtype

_BYTES_1, _BYTES_2 = 348, 540
_MAGIC_1 = {b"n+1\0": False, b"ni1\0": True}
_MAGIC_2 = {b"n+2\0\r\n\x1a\n": False, b"ni2\0\r\n\x1a\n": True}

# DEFLATE (RFC 1951) encodes at most 258 bytes in two bits.
_MOST_INFLATED = 1032
_MOST_VOXELS = 1 << 32
_CHUNK = 1 << 22

_COPY = "copy or convert it again"

# intent_code: values for which the axes behind the third are no time.
_LABELS = 1002
_VECTORS = {1004: "matrices", 1005: "matrices", 1006: "displacements", 1007: "vectors", 1008: "points",
            1009: "triangles", 1010: "quaternions", 2003: "colours", 2004: "colours", 2005: "shapes of surfaces"}
_CIFTI = range(3000, 3100)


@dataclass(frozen=True)
class NiftiFile:
    """A header that was checked, and where the voxels are.

    Attributes:
        header: as nibabel reads it.
        data_path: the file with the voxels, the header's own or the `.img` beside it.
        shape_XYZT: with 1 where there is no such axis.
        dtype: of the voxels as they are stored.
        offset: of the first voxel in `data_path`, inflated.
        slope, inter: value = slope x stored + inter.
    """

    header: Nifti1Header
    data_path: Path
    shape_XYZT: tuple[int, int, int, int]
    dtype: np.dtype
    offset: int
    slope: float
    inter: float

    @property
    def num_voxels(self) -> int:
        """In all volumes."""
        return math.prod(self.shape_XYZT)


def is_nifti(head: bytes) -> bool:
    """Whether a file that begins so is NIfTI, compressed or not. Never raises."""
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _BYTES_2)
        except zlib.error:
            return False
    return head[344:348] in _MAGIC_1 or head[4:12] in _MAGIC_2


def data_path_of(header_path: Path, is_there: Callable[[Path], bool] = Path.is_file) -> Path | None:
    """The `.img` of a `.hdr`, whichever of the two is compressed and however they are spelt; None if there is none.

    Args:
        header_path: of the pair.
        is_there: tells whether there is such a file.
    """
    return _sibling(header_path, ".hdr", ".img", is_there)


def header_path_of(data_path: Path) -> Path | None:
    """The `.hdr` of an `.img`."""
    return _sibling(data_path, ".img", ".hdr", Path.is_file)


def open_nifti(path: Path) -> NiftiFile:
    """Read and check a header.

    Args:
        path: `.nii`, `.nii.gz` or the `.hdr` of a pair.

    Raises:
        Refusal: not NIfTI, not an image, or not what its header says.
    """
    header, is_pair = _header(path)
    intent = int(header["intent_code"])
    if intent in _CIFTI:
        raise Refusal("unsupported-format", f"it is {neighbours.CIFTI.format}", neighbours.CIFTI.mend)
    if intent in _VECTORS:
        raise Refusal("not-an-image", f"its voxels are {_VECTORS[intent]}", "leave it out")
    if intent == _LABELS:
        raise Refusal("not-an-image", "its voxels are labels", "leave it out, and give the image that was labelled")
    shape = _shape(header)
    dtype = _dtype(header)
    data_path = data_path_of(path) if is_pair else path
    if data_path is None:
        raise Refusal("missing-file", "the .img of this .hdr is missing", "put the .img beside it")
    least_offset = 0 if is_pair else 544 if isinstance(header, Nifti2Header) else 352
    offset = float(header["vox_offset"]) or least_offset
    if not (math.isfinite(offset) and offset >= least_offset and offset == int(offset)):
        raise Refusal("bad-header", "its header gives no valid place for the voxels (vox_offset)", _COPY)
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        slope, inter = 1.0, 0.0
    if not math.isfinite(inter):
        raise Refusal("bad-header", "its header scales voxels to what is no number (scl_inter)", _COPY)
    found = NiftiFile(header, data_path, shape, dtype, int(offset), slope, inter)
    _check_size(found)
    return found


def read_voxels(file: NiftiFile) -> tuple[np.ndarray, bool]:
    """The scaled values in the smallest type that holds them, and whether whole numbers had to be rounded to float32.

    Returns:
        voxels_TZYX in C order; whether they were rounded.

    Raises:
        Refusal: truncated, damaged, or with voxels that are not finite.
    """
    stored = np.empty(file.num_voxels, dtype=file.dtype)
    try:
        with _opened(file.data_path) as stream:
            _fill(stream, file.offset, stored)
    except EOFError:
        raise Refusal("truncated", "it is cut short", _COPY) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Refusal("damaged", "its compressed content is damaged", _COPY) from error
    if not file.dtype.isnative:
        stored = stored.byteswap(inplace=True).view(file.dtype.newbyteorder("="))
    voxels, is_rounded = rescale(stored, file.slope, file.inter)
    return voxels.reshape(file.shape_XYZT[::-1]), is_rounded


def rescale(stored: np.ndarray, slope: float, inter: float) -> tuple[np.ndarray, bool]:
    """slope x stored + inter, in the smallest type that holds the values exactly (float32 where none does).

    Args:
        stored: one axis, native byte order, whole numbers or floats.
        slope, inter: of the header.

    Returns:
        The values; whether they are whole numbers that float32 had to round.

    Raises:
        Refusal: some value is not finite.
    """
    # In blocks, so that at no time there are more than the stored voxels, the values, and a block between them.
    blocks = [slice(start, start + _CHUNK) for start in range(0, stored.size, _CHUNK)]
    if stored.dtype.itemsize <= 2 and stored.dtype.kind in "iu":
        # There are few values, so a table of them is scaled instead of the voxels.
        unsigned = stored.view(f"u{stored.dtype.itemsize}")
        candidates = np.arange(1 << (8 * stored.dtype.itemsize), dtype=unsigned.dtype).view(stored.dtype)
        occurs = np.zeros(candidates.size, dtype=bool)
        for block in blocks:
            occurs[unsigned[block]] = True
        scaled = _scale(candidates[occurs], slope, inter)
        _check_finite(scaled)
        table = np.zeros(candidates.size, dtype=smallest_dtype(scaled))
        table[occurs] = scaled
        values = np.empty(stored.size, dtype=table.dtype)
        for block in blocks:
            values[block] = table[unsigned[block]]
        return values, False
    extremes, is_whole = [], True
    for block in blocks:
        scaled = _scale(stored[block], slope, inter)
        _check_finite(scaled)
        extremes += [scaled.min(), scaled.max()]
        is_whole = is_whole and (scaled.dtype.kind in "iu" or bool((np.rint(scaled) == scaled).all()))
    values = np.empty(stored.size, dtype=smallest_dtype(np.array(extremes)) if is_whole else "float32")
    is_rounded = False
    for block in blocks:
        scaled = _scale(stored[block], slope, inter)
        values[block] = scaled
        is_rounded = is_rounded or (is_whole and bool((values[block] != scaled).any()))
    return values, is_rounded


def _scale(stored: np.ndarray, slope: float, inter: float) -> np.ndarray:
    return stored if (slope, inter) == (1.0, 0.0) else stored.astype(np.float64) * slope + inter


def _check_finite(values: np.ndarray) -> None:
    """Raise for what is not finite, or would not be as float32."""
    if values.dtype.kind == "f":
        num_bad = int(values.size - np.count_nonzero(np.abs(values) <= np.finfo(np.float32).max))
        if num_bad:
            raise Refusal("not-finite", "it has voxels that are not finite (NaN or infinite)",
                          "replace them, for instance with 0 outside the body, and write it again")


def _header(path: Path) -> tuple[Nifti1Header, bool]:
    """The header, and whether its voxels are in a file of their own."""
    try:
        with _opened(path) as stream:
            block = stream.read(_BYTES_2)
    except EOFError:
        raise Refusal("truncated", "it is cut short", _COPY) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Refusal("damaged", "its compressed content is damaged", _COPY) from error
    try:
        if block[4:12] in _MAGIC_2 and len(block) >= _BYTES_2:
            return Nifti2Header(block[:_BYTES_2], check=False), _MAGIC_2[block[4:12]]
        if block[344:348] in _MAGIC_1:
            return Nifti1Header(block[:_BYTES_1], check=False), _MAGIC_1[block[344:348]]
    except HeaderDataError as error:
        raise Refusal("bad-header", "its header contradicts itself", _COPY) from error
    if len(block) < _BYTES_1:
        raise Refusal("truncated", "it is shorter than a header", _COPY)
    if _BYTES_1 in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")):
        raise Refusal("unsupported-format", f"it is {neighbours.ANALYZE.format}", neighbours.ANALYZE.mend)
    raise Refusal("not-nifti", "it is named like NIfTI, and is not", "give the file that was meant, or leave it out")


def _shape(header: Nifti1Header) -> tuple[int, int, int, int]:
    num_axes = int(header["dim"][0])
    dims = [int(size) for size in header["dim"][1 : num_axes + 1]] if 1 <= num_axes <= 7 else []
    if not dims or min(dims) < 1:
        raise Refusal("bad-header", "its header gives no valid number of voxels (dim)", _COPY)
    dims += [1] * (4 - len(dims))
    if max(dims[4:], default=1) > 1:
        raise Refusal("unsupported-dimensions", f"it has {len(dims)} dimensions, more than space and time",
                      "write it with four at most")
    if sum(size > 1 for size in dims[:3]) < 2:
        raise Refusal("not-an-image", "it has voxels along one axis of space alone", "leave it out")
    if math.prod(dims) > _MOST_VOXELS:
        raise Refusal("too-large", "its header says that it has more than 2^32 voxels", "split it, or copy it again")
    return dims[0], dims[1], dims[2], dims[3]


def _dtype(header: Nifti1Header) -> np.dtype:
    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except KeyError:
        dtype = np.dtype("V1")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise Refusal("unsupported-voxels", f"its voxels are colours, complex or of an unknown type (datatype {code})",
                      "write it with plain numbers, for instance magnitudes")
    return dtype


def _check_size(file: NiftiFile) -> None:
    """Whether the file can have as many voxels as the header says, told without reading them."""
    size = file.data_path.stat().st_size
    wanted = file.offset + file.num_voxels * file.dtype.itemsize
    if _is_compressed(file.data_path):
        if wanted > size * _MOST_INFLATED:
            raise Refusal("truncated", "it is smaller than its header says, however well it is compressed", _COPY)
    elif size < wanted:
        raise Refusal("truncated", "it is cut short", _COPY)
    elif size > wanted:
        raise Refusal("damaged", "it has more bytes than its header says", _COPY)


def _fill(stream: IO[bytes], offset: int, stored: np.ndarray) -> None:
    """Read an array's bytes; what follows them must be the end. EOFError: it comes too early."""
    while offset:
        skipped = len(stream.read(min(offset, _CHUNK)))
        if not skipped:
            raise EOFError
        offset -= skipped
    view = stored.view(np.uint8).data
    start = 0
    while start < len(view):
        count = stream.readinto(view[start : start + _CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        start += count
    # Also has the checksum of compressed content compared.
    if stream.read(1):
        raise Refusal("damaged", "it has more bytes than its header says", _COPY)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if _is_compressed(path):
            with gzip.GzipFile(fileobj=file) as inflated:
                yield inflated  # type: ignore[misc]
        else:
            yield file


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _sibling(path: Path, own: str, other: str, is_there: Callable[[Path], bool]) -> Path | None:
    """The file beside it with another suffix."""
    name = path.name.removesuffix(".gz").removesuffix(".GZ")
    if not name.lower().endswith(own):
        return None
    stem = name[: -len(own)]
    for suffix in (other, other.upper(), f"{other}.gz"):
        if is_there(candidate := path.with_name(stem + suffix)):
            return candidate
    return None
