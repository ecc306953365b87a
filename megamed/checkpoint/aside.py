"""Folders that exist when they are complete: written under another name, and renamed.

A writing that was killed may go on where it was, if it says what it is of.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megamed.checkpoint.writer import reason_of, write_file
from megamed.utils import UserError
from megamed.utils.files import sync

IDENTITY = "identity.txt"


@contextlib.contextmanager
def written_aside(target: Path, num_bytes: int, identity: str | None = None) -> Iterator[Path]:
    """The folder to write to; after the block it is the target, and what was there before is gone.

    Args:
        target: the folder that is written.
        num_bytes: that it takes, for a check of the disk.
        identity: what it is made of and how. Where it is given, a killed program leaves what it has written, and the
            next one of the same identity finds it. None begins anew each time.

    Raises:
        UserError: the disk is full or not writable. What was written is removed.
    """
    aside, discarded = (target.with_name(f"{target.name}.{word}") for word in ("unfinished", "discarded"))
    mark = aside / IDENTITY
    try:
        _clean(target, aside, discarded, identity)
        _need_space(target, num_bytes - _bytes_in(aside))
        aside.mkdir(parents=True, exist_ok=True)
        if identity is not None:
            write_file(mark, identity.encode())
        yield aside
        mark.unlink(missing_ok=True)
        sync(aside)
        if target.exists():
            os.rename(target, discarded)
        os.rename(aside, target)
        sync(target.parent)
        shutil.rmtree(discarded, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's error into a RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        free_mib = shutil.disk_usage(_existing(target)).free >> 20  # torch does not always say that a disk is full
        raise UserError(
            f"--to {target}: cannot be written ({reason_of(error)}; {free_mib} MiB free there); free space, or name a "
            "folder on another disk"
        ) from error
    except BaseException as error:
        if identity is None or isinstance(error, Exception):
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _clean(target: Path, aside: Path, discarded: Path, identity: str | None) -> None:
    """Remove what a killed run left; one that was killed between its renames had moved the target away."""
    if discarded.exists() and not target.exists():
        os.rename(discarded, target)
    mark = aside / IDENTITY
    goes_on = identity is not None and mark.is_file() and mark.read_text() == identity
    for leftover in (discarded,) if goes_on else (aside, discarded):
        if leftover.exists():
            shutil.rmtree(leftover)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def _need_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(_existing(target.parent)).free
    if free < num_bytes:
        raise UserError(
            f"--to {target}: takes {num_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there; free "
            "space, or name a folder on another disk"
        )
