"""What the names of a file and of its folders say of whose it is.

Three layouts are known; the name nearest to the file counts, and symbolic links are not followed.

| layout | path | patient | study |
|---|---|---|---|
| BIDS | `sub-01/ses-02/anat/sub-01_ses-02_T1w.nii.gz` | `sub-01` | `sub-01_ses-02`, without sessions `sub-01` |
| MIMIC-CXR | `files/p10/p10000032/s50414267/....jpg` | `p10000032` | `s50414267` |
| CheXpert | `train/patient00001/study1/view1_frontal.jpg` | `patient00001` | `patient00001/study1` |

Two BIDS data sets that both have a `sub-01` are told apart only by two stores.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

_SUBJECT = re.compile(r"(?:^|_)(sub-[0-9A-Za-z]+)(?=[_.]|$)")
_SESSION = re.compile(r"(?:^|_)(ses-[0-9A-Za-z]+)(?=[_.]|$)")
_MIMIC = re.compile(r"p\d+"), re.compile(r"s\d+")
_CHEXPERT = re.compile(r"patient\d+"), re.compile(r"study\d+")

# Files up to here are hashed whole; of larger ones 1,025 blocks of 16 KiB, the first and the last among them.
_WHOLE_BYTES, _BLOCKS, _BLOCK_BYTES = 64 << 20, 1024, 16 << 10


def patient_and_study(path: Path) -> tuple[str, str]:
    """The patient's and the study's names as the path has them, empty where it is of no layout that is known."""
    parts = path.absolute().parts
    session = ""
    for part in reversed(parts):
        found = _SESSION.search(part)
        session = session or (found[1] if found else "")
        if subject := _SUBJECT.search(part):
            return subject[1], f"{subject[1]}_{session}" if session else subject[1]
    for above, below in reversed(list(zip(parts, parts[1:-1], strict=False))):
        if _MIMIC[0].fullmatch(above) and _MIMIC[1].fullmatch(below):
            return above, below
        if _CHEXPERT[0].fullmatch(above) and _CHEXPERT[1].fullmatch(below):
            return above, f"{above}/{below}"
    return "", ""


def fingerprint(paths: Sequence[Path]) -> str:
    """A hash of files' content, the same wherever they lie: what a series is called that has no identifier.

    A file of more than 64 MiB is hashed by its size and 1,025 blocks spread evenly over it, so that a scan does not
    read a disk from end to end. In a compressed file the last block holds the checksum of all of it.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size}:".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                while block := file.read(1 << 20):
                    digest.update(block)
                continue
            for i in range(_BLOCKS + 1):
                file.seek((size - _BLOCK_BYTES) * i // _BLOCKS)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def without_suffix(path: Path) -> str:
    """The name of a file without `.nii.gz`, `.hdr`, `.json`, ...: what belongs together has it in common."""
    return path.name.removesuffix(".gz").rpartition(".")[0]
