"""A file of a run that gets a line every few steps."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamed.utils import UserError

log = logging.getLogger(__name__)


class StepLog:
    """JSON objects, one a line, each with the number of its `step`; written by rank 0 alone, at once.

    A resumed run first drops the lines of steps after its checkpoint, which it takes again. While the disk is full,
    lines are kept in memory, and written when there is room.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: Any = None
        self._waiting = b""
        self._is_full = False

    def start(self, step: int) -> None:
        """Open the file and keep its lines up to a step.

        Raises:
            UserError: the file cannot be written.
        """
        if dist.get_rank() == 0:
            self.close()
            try:
                aside = self.path.with_suffix(f"{self.path.suffix}.new")
                with open(aside, "w") as kept:
                    self._copy_lines_up_to(step, kept)
                aside.replace(self.path)
                self.file = open(self.path, "ab", buffering=0)
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror or error}); free space there or set run.dir to "
                    "another disk, then run again"
                ) from error

    def _copy_lines_up_to(self, step: int, kept: Any) -> None:
        """Complete lines of earlier steps; the last one may have been cut by a kill."""
        if step and self.path.exists():
            with open(self.path, errors="replace") as lines:
                for line in lines:
                    try:
                        if not line.endswith("\n"):
                            raise ValueError("no end")
                        if json.loads(line)["step"] <= step:
                            kept.write(line)
                    except (ValueError, LookupError, TypeError):
                        log.warning("%s: a line that was cut short is dropped", self.path)

    def write(self, values: dict[str, Any]) -> None:
        """Add a line."""
        if self.file:
            self._waiting += json.dumps(values).encode() + b"\n"
            self._flush()

    def close(self) -> None:
        if self.file:
            self._flush()
            self.file.close()
            self.file = None

    def _flush(self) -> None:
        try:
            while self._waiting:
                # Part of a line may be written; the rest of it comes next.
                self._waiting = self._waiting[os.write(self.file.fileno(), self._waiting) :]
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                log.warning(
                    "%s: cannot be written (%s); its lines are kept in memory until there is room, free some",
                    self.path, error.strerror or error,
                )
            self._is_full = True
