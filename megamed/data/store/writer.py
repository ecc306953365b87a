"""Writing a volume store: killed at any moment, it has every series whole or not at all.

A worker process writes a series into a folder of its own under `.unfinished`; the process that holds the lock moves
that folder to its place with one rename. What a killed process left under `.unfinished` the next writer removes.

A series that is there already with other content (more slices arrived) is moved aside, the new one takes its place,
and the old one is deleted. Who has the old voxels mapped keeps them (on NFS only where it is the same machine). Killed
between the two renames, the next writer puts the old one back.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Identity
from megamed.data.series import DTYPES, Series
from megamed.data.store import index
from megamed.data.store.record import HEADER, VOXELS, SeriesRecord, is_series_name, read_record
from megamed.data.store.volume_store import ASIDE, VolumeStore
from megamed.utils import UserError
from megamed.utils.files import sync

UNFINISHED = ".unfinished"
LOCK = ".lock"

_REPLACED = ".replaced"


def write_series(root: Path, name: str, identity: Identity, series: Series, pseudonyms: Pseudonyms) -> Path:
    """Write a series into a new folder under `.unfinished`, for `StoreWriter.commit` to move to its place.

    Needs no lock: any number of processes may do it at once. `info.provenance` becomes the keyed hash of the voxels
    and their geometry.

    Args:
        root: of the store.
        name: of the series, by `series_id`.
        identity: whose it is.
        series: what the reader returned; its shape and dtype are what its `info` says.
        pseudonyms: of the project.

    Returns:
        The folder.
    """
    voxels, info = series.voxels_TSHW, series.info
    said = (info.dtype, info.shape)
    if not is_series_name(name) or said != (voxels.dtype.name, voxels.shape) or info.dtype not in DTYPES:
        raise ValueError(f"series {name!r} of {voxels.dtype} {voxels.shape}, said to be {info.dtype} {info.shape}")
    folder = root / UNFINISHED / f"{name}.{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    digest = hashlib.sha256()
    with (folder / VOXELS).open("wb") as file:
        for block in _npy_blocks(voxels):
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    geometry = [digest.hexdigest(), info.affine, info.slice_positions_mm]
    info = replace(info, provenance=pseudonyms.provenance(json.dumps(geometry).encode()))
    record = SeriesRecord(
        name, identity.patient, identity.study, identity.accession, identity.study_date, info, folder,
        digest.hexdigest(),
    )
    (folder / HEADER).write_text(record.to_json(), encoding="utf-8")
    sync(folder / HEADER)
    sync(folder)
    return folder


class StoreWriter:
    """The one process that may change a store; a context manager, which at its end writes the index.

    The lock goes with the process, however it ends; processes forked from it while it is held hold it, too, so start
    workers by spawn.

    Args:
        store: to change.

    Raises:
        UserError: another process is writing it, or the file system has no locks.
    """

    def __init__(self, store: VolumeStore):
        self._root = store.root
        self._unfinished = store.root / UNFINISHED
        self._lock = _lock(store.root / LOCK)
        self._clear()
        # Someone may have deleted a folder by hand.
        self._has_index = index.misfits(self._root) == (0, 0)

    def commit(self, folder: Path) -> SeriesRecord:
        """Move what `write_series` wrote to its place. A series that is there with the same content stays as it is.

        Raises:
            UserError: the folder is not a whole series.
        """
        record = read_record(folder, folder.name.partition(".")[0])
        place = index.folder_of(self._root, record.series)
        if _is_same(folder, place):
            shutil.rmtree(folder)
            return replace(record, folder=place)
        if self._has_index:
            (self._root / index.INDEX).unlink()  # it is there only where it is true
            sync(self._root)
            self._has_index = False
        if not place.parent.is_dir():
            place.parent.mkdir(parents=True)
            sync(self._root / index.SERIES)
        old = self._unfinished / f"{record.series}{_REPLACED}"
        if place.exists():
            place.rename(old)
        folder.rename(place)
        sync(place.parent)
        shutil.rmtree(old, ignore_errors=True)
        return replace(record, folder=place)

    def write_index(self) -> None:
        """Write the index where it has to be; what is committed later takes it away again.

        Raises:
            UserError: the folder of a series is damaged.
        """
        if not self._has_index:
            index.write(self._root)
            self._has_index = True

    def close(self) -> None:
        """Write the index where it has to be, remove what is unfinished, and let go of the lock.

        Raises:
            UserError: the folder of a series is damaged.
        """
        try:
            self._clear()
            self.write_index()
        finally:
            os.truncate(self._lock, 0)
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _clear(self) -> None:
        """Put back what a killed writer was about to replace, and remove the rest of what it left."""
        self._unfinished.mkdir(exist_ok=True)
        for aside in self._root.glob(f"{ASIDE}*"):
            aside.unlink(missing_ok=True)
        for folder in self._unfinished.iterdir():
            place = index.folder_of(self._root, folder.name.removesuffix(_REPLACED))
            if folder.name.endswith(_REPLACED) and not place.exists():
                folder.rename(place)
                sync(place.parent)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _is_same(new: Path, old: Path) -> bool:
    """Whether two folders have the same header, which holds the sum of the voxels, and as many bytes of voxels."""
    try:
        return (new / HEADER).read_bytes() == (old / HEADER).read_bytes() \
            and (new / VOXELS).stat().st_size == (old / VOXELS).stat().st_size
    except OSError:
        return False


def _npy_blocks(voxels: np.ndarray) -> Iterator[bytes | memoryview]:
    """The bytes of an array as a `.npy` file of format 1.0: C order, little-endian, voxels from a multiple of 64 on.

    Slice after slice, so that a turned view is not copied as a whole.
    """
    header = io.BytesIO()
    dtype = voxels.dtype.newbyteorder("<")
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": voxels.shape}
    )
    yield header.getvalue()
    for volume in voxels:
        for slice_ in volume:
            yield np.ascontiguousarray(slice_, dtype=dtype).reshape(-1).view(np.uint8).data


def _lock(path: Path) -> int:
    """Take the store's lock; the file says who has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"{path.parent} is being written by {holder}; wait until it is done") from None
        raise UserError(f"{path} cannot be locked ({error.strerror}); put the store on a file system with locks") \
            from error
    return descriptor
