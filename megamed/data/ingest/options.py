"""What bounds an ingest, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Of the machine's memory: the rest is for the system, its file cache, and this process.
_SHARE_OF_MEMORY = 0.7


@dataclass(frozen=True)
class Limits:
    """What a file may cost. A file beyond it is refused, and listed; nothing else is held up.

    Attributes:
        seconds: for decoding one series, and for looking at one file's header.
        num_bytes: memory that all series under way may take together; None is 70 % of what the machine, or the
            control group (Slurm, containers), has.
        num_voxels: of one series.
        file_bytes: of one file, or member of an archive.
    """

    seconds: float = 600.0
    num_bytes: int | None = None
    num_voxels: int = 4_000_000_000
    file_bytes: int = 32 << 30


@dataclass
class Outcome:
    """What an ingest did, and what the store has now.

    Attributes:
        new_series, known_series: of the sources: read in this run; in the store already.
        studies, series, frames, num_bytes: of the store; frames are slices times volumes, bytes those of voxels.
        samples: in the store's `samples.jsonl`.
        kinds: regular files below the sources, members of archives included, by what became of them: `series`,
            `report`, `sidecar`, `index`, `archive`, `hidden` (what operating systems leave behind, too), `refused`.
        refused: files, and entries of files of reports, by the code of the reason.
        seconds: it took.
        quarantine: the table of the files that were refused.
    """

    new_series: int = 0
    known_series: int = 0
    studies: int = 0
    series: int = 0
    frames: int = 0
    num_bytes: int = 0
    samples: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    quarantine: Path = Path()

    @property
    def files(self) -> int:
        """Regular files below the sources."""
        return sum(self.kinds.values())


def memory_to_use() -> int:
    """Bytes: a share of the machine's memory, or of the tightest control group's that this process is in."""
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    return int(_SHARE_OF_MEMORY * min([total, *_group_limits()]))


def _group_limits() -> Iterator[int]:
    """Memory limits of the control groups of this process, of both versions of the interface."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        own = root / group.lstrip("/")
        for folder in (own, *own.parents):
            try:
                yield int((folder / name).read_text())
            except (OSError, ValueError):  # not there; or "max", which is none
                pass
            if folder == root:
                break
