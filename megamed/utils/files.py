"""Files that outlast a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file; a killed program leaves the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    os.replace(unfinished, path)
