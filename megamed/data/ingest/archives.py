"""Zip and tar archives as folders: their members are listed, checked, and unpacked one at a time.

An archive may be in an archive, and a tar may be compressed; such a one is unpacked whole, once, for the time of the
run. Nothing of an archive is believed: sizes are counted while unpacking, names are only ever used below a folder of
the run's own, and links, devices and encrypted members are refused.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from megamed.data.readers import Refusal

Kind = Literal["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]

MAX_DEPTH = 2
"""Archives in archives: so many inside one another."""
MAX_MEMBERS = 1_000_000

# Pictures shrink to a half, masks and empty slices to a hundredth; what is small need not be looked at.
_LARGEST_RATIO = 200
_SMALL_MEMBER, _SMALL_ARCHIVE = 256 << 20, 1 << 30

_OPENERS: dict[str, Any] = {"tar.gz": gzip.open, "tar.bz2": bz2.open, "tar.xz": lzma.open}
_SUFFIXES: dict[str, Kind] = {
    ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".tar.bz2": "tar.bz2", ".tbz2": "tar.bz2", ".tar.xz": "tar.xz",
    ".txz": "tar.xz",
}  # fmt: skip
_MAGIC = {"tar.gz": b"\x1f\x8b", "tar.bz2": b"BZh", "tar.xz": b"\xfd7zXZ\0"}
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
# What Python's libraries raise about archives that are damaged; bz2 and gzip also OSError without a number.
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, KeyError, IndexError,
    RuntimeError, struct.error, OverflowError,
)  # fmt: skip

_MEND_EXPORT = "pack it again, or unpack it and give the folder"


class Container(NamedTuple):
    """An archive: a file, or a member of the archive before it in the chain."""

    kind: Kind
    name: str


Chain = tuple[Container, ...]
"""From an archive that is a file to one that is in it."""


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    size: int


def kind_of(name: str, head: bytes) -> Kind | None:
    """Whether a file is an archive, by name and first 1024 bytes. Office documents, which are zips, are none."""
    name = name.casefold()
    if head.startswith(_ZIP_MAGIC) and (name.endswith(".zip") or "." not in name):
        return "zip"
    if head[257:262] == b"ustar" and (name.endswith(".tar") or "." not in name):
        return "tar"
    for suffix, kind in _SUFFIXES.items():
        if name.endswith(suffix) and head.startswith(_MAGIC[kind]):
            return kind
    return None


class Unpacker:
    """Lists and unpacks.

    Args:
        folder: private, for what is unpacked for the time of a run.
        file_bytes: the largest member.
    """

    def __init__(self, folder: Path, file_bytes: int):
        self._folder, self._file_bytes = folder, file_bytes
        self._open: tuple[Chain, zipfile.ZipFile | tarfile.TarFile] | None = None

    def members(self, chain: Chain) -> Iterator[tuple[str, Member | Refusal]]:
        """Files in an archive by their names, or why they cannot be used.

        Raises:
            Refusal: the archive cannot be used.
        """
        with _refusing():
            archive = self._archive(chain)
            entries = list(_zip_entries(archive) if isinstance(archive, zipfile.ZipFile) else _tar_entries(archive))
        if len(entries) > MAX_MEMBERS:
            raise _bomb(f"it has more than {MAX_MEMBERS:,} members")
        total, packed = sum(entry.size for entry in entries), self._path(chain).stat().st_size
        if total > max(_SMALL_ARCHIVE, _LARGEST_RATIO * packed):
            raise _bomb(f"its members unpack to {total / max(packed, 1):,.0f} times its size")
        if isinstance(archive, zipfile.ZipFile) and sum(entry.packed for entry in entries) > packed:
            raise _bomb("its members overlap")
        times = Counter(entry.name for entry in entries)
        for entry in entries:
            refusal = entry.refusal or _check_name(entry.name) or self._check_size(entry)
            if times[entry.name] > 1:
                refusal = Refusal("duplicate-member", "the archive has several members of this name", _MEND_EXPORT)
            yield entry.name, refusal or Member(entry.name, entry.size)

    def unpack(self, chain: Chain, name: str, target: Path) -> None:
        """Write a member to a file.

        Raises:
            Refusal: the archive is damaged there.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with _refusing(), self._member(chain, name) as source, open(target, "wb") as file:
            _copy(source, file, self._file_bytes)

    def has(self, chain: Chain, name: str) -> bool:
        """Whether an archive has a member of that name."""
        archive = self._archive(chain)
        try:
            if isinstance(archive, zipfile.ZipFile):
                archive.getinfo(name)
            else:
                _tar_member(archive, name)
        except KeyError:
            return False
        return True

    def _member(self, chain: Chain, name: str) -> IO[bytes]:
        archive = self._archive(chain)
        if isinstance(archive, zipfile.ZipFile):
            return archive.open(name)
        source = archive.extractfile(_tar_member(archive, name))
        if source is None:
            raise tarfile.TarError("no file")
        return source

    def _archive(self, chain: Chain) -> zipfile.ZipFile | tarfile.TarFile:
        """An archive, opened; it stays open until another is asked for."""
        if self._open is None or self._open[0] != chain:
            path = self._path(chain)
            archive = zipfile.ZipFile(path) if chain[-1].kind == "zip" else tarfile.open(path, "r:")
            if self._open is not None:
                self._open[1].close()
            self._open = chain, archive
        return self._open[1]

    def _path(self, chain: Chain) -> Path:
        """Where an archive lies that can be read at any place; it is unpacked the first time."""
        kind, name = chain[-1]
        if len(chain) == 1 and kind not in _OPENERS:
            return Path(name)
        path = self._folder / hashlib.sha256(repr(chain).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        if path.exists():
            return path
        self._folder.mkdir(parents=True, exist_ok=True)
        packed, aside = Path(name), path.with_name(f"{path.name}.{os.getpid()}")
        if len(chain) > 1:
            packed = aside.with_suffix(".packed")
            self.unpack(chain[:-1], name, packed)
        if kind in _OPENERS:
            limit = max(_SMALL_ARCHIVE, _LARGEST_RATIO * packed.stat().st_size)
            with _OPENERS[kind](packed) as source, open(aside, "wb") as file:
                _copy(source, file, limit)
            if len(chain) > 1:
                packed.unlink()
        else:
            packed.rename(aside)
        aside.rename(path)  # another worker may have been faster; its copy is the same
        return path

    def _check_size(self, entry: _Entry) -> Refusal | None:
        if entry.size > self._file_bytes:
            return Refusal("too-large", f"it has {entry.size / 2**30:,.1f} GiB", "unpack it, and give it alone")
        if entry.size > max(_SMALL_MEMBER, _LARGEST_RATIO * entry.packed):
            return _bomb(f"it unpacks to {entry.size / max(entry.packed, 1):,.0f} times its size")
        return None


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    packed: int
    refusal: Refusal | None = None


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in archive.infolist():
        if info.is_dir():
            continue
        refusal = None
        mode = info.external_attr >> 16
        if info.flag_bits & 1:
            refusal = Refusal("encrypted", "it is encrypted", "decrypt the archive, and give that")
        elif mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
            refusal = _no_file()
        yield _Entry(info.filename, info.file_size, info.compress_size, refusal)


def _tar_entries(archive: tarfile.TarFile) -> Iterator[_Entry]:
    for info in archive:
        if not info.isdir():
            refusal = None if info.isreg() and not info.issparse() else _no_file()
            yield _Entry(info.name.removeprefix("./"), info.size, info.size, refusal)


def _tar_member(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    try:
        return archive.getmember(name)
    except KeyError:
        return archive.getmember(f"./{name}")


def _check_name(name: str) -> Refusal | None:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        return Refusal("unsafe-path", "its name leads out of the archive", _MEND_EXPORT)
    if os.path.normpath(name) != name or any(len(os.fsencode(part)) > 255 for part in parts):
        return Refusal("unsafe-path", "its name is none that a file can have", _MEND_EXPORT)
    return None


def _no_file() -> Refusal:
    return Refusal("not-a-file", "it is a link or a device in an archive", _MEND_EXPORT)


def _bomb(why: str) -> Refusal:
    return Refusal("archive-bomb", why, "unpack it yourself if it is sound, and give the folder")


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what the libraries raise about a damaged archive into a refusal."""
    try:
        yield
    except NotImplementedError as error:
        raise Refusal("compression", "its compression cannot be read", _MEND_EXPORT) from error
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the archive's
        raise Refusal("damaged-archive", f"the archive is damaged ({type(error).__name__})", _MEND_EXPORT) from error


def _copy(source: IO[bytes], target: IO[bytes], limit: int) -> None:
    while chunk := source.read(1 << 20):
        limit -= len(chunk)
        if limit < 0:
            raise _bomb("it unpacks to more than it may")
        target.write(chunk)


def clear(folder: Path) -> None:
    """Remove what a run that was killed had unpacked."""
    shutil.rmtree(folder, ignore_errors=True)
