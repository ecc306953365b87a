"""Which files lie below the sources."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megamed.data.readers import Refusal
from megamed.utils import UserError

_LITTER = {"thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx", "$recycle.bin", "system volume information"}


class Found(NamedTuple):
    """A file, and what tells whether it has changed since."""

    path: str
    size: int
    mtime_ns: int


def is_litter(name: str) -> bool:
    """Whether the name of a file or folder is hidden, or one that operating systems leave behind."""
    return name.startswith(".") or name.casefold() in _LITTER


def is_index_name(name: str) -> bool:
    """Whether a file's name is that of the index of a DICOM medium (PS3.10, 8.6)."""
    return name.casefold().partition(".")[0] == "dicomdir"


def roots(sources: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Sources as absolute paths, each once; an index stands for its folder.

    Raises:
        UserError: there is nothing of that name.
    """
    found: dict[str, None] = {}
    for source in sources:
        path = os.path.abspath(os.fspath(source))
        if not os.path.exists(path):
            raise UserError(f"{os.fspath(source)}: no such file or folder; give sources that exist")
        if os.path.isfile(path) and is_index_name(os.path.basename(path)):
            path = os.path.dirname(path)
        found[path] = None
    return list(found)


class Walk:
    """All regular files below some roots, each folder once, by name: the order is always the same.

    Links are followed. After the iteration, `refused` has what cannot be looked at, and `num_ignored` the number of
    files that are litter or lie in hidden folders.

    Args:
        roots: files and folders; what is named here is looked at even if its name is hidden.
        leave_out: folders that are passed over: the store's own.
    """

    def __init__(self, roots: Iterable[str], leave_out: Iterable[str]):
        self._roots, self._leave_out = list(roots), set(leave_out)
        self._seen: set[tuple[int, int]] = set()
        self.refused: list[tuple[str, Refusal]] = []
        self.num_ignored = 0

    def __iter__(self) -> Iterator[Found]:
        given: set[str] = set()
        for root in sorted(self._roots, key=os.path.isfile):  # a file within a folder that is given, too, comes once
            if os.path.isdir(root):
                yield from self._below(root)
            elif not any(root.startswith(f"{folder}/") for folder in given):
                yield from self._file(root)
            given.add(root)

    def _below(self, root: str) -> Iterator[Found]:
        waiting = [(root, True)]
        while waiting:
            path, is_folder = waiting.pop()
            if is_folder:
                waiting += reversed(self._list(path))
            else:
                yield from self._file(path)

    def _list(self, folder: str) -> list[tuple[str, bool]]:
        """What is to be looked at in a folder, and whether it is a folder itself."""
        if folder in self._leave_out:
            return []
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                found = sorted((entry.name, entry.is_dir()) for entry in entries)
        except OSError as error:
            self.refused.append((folder, unreadable(error)))
            return []
        here = (status.st_dev, status.st_ino)
        if here in self._seen and status.st_ino:
            return []
        self._seen.add(here)
        self.num_ignored += sum(_count(os.path.join(folder, name)) for name, _ in found if is_litter(name))
        return [(os.path.join(folder, name), is_folder) for name, is_folder in found if not is_litter(name)]

    def _file(self, path: str) -> Iterator[Found]:
        try:
            status = os.stat(path)
        except OSError as error:
            self.refused.append((path, unreadable(error)))
            return
        if stat.S_ISREG(status.st_mode):
            yield Found(path, status.st_size, status.st_mtime_ns)


def unreadable(error: OSError) -> Refusal:
    """Why a file that the system does not give is refused."""
    why = error.strerror or type(error).__name__
    return Refusal("unreadable", f"it cannot be read ({why})", "mend its permissions, or copy it again")


def _count(path: str) -> int:
    """Regular files at and below a path."""
    if not os.path.isdir(path) or os.path.islink(path):
        return int(os.path.isfile(path))
    return sum(len(files) for _, _, files in os.walk(path))
