"""A file of a run that gets a line every few steps."""

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamed.utils import UserError

log = logging.getLogger(__name__)


class StepLog:
    """JSON objects, one a line, each with the number of its `step`; written by rank 0 alone, and flushed at once.

    A resumed run first drops the lines of steps after its checkpoint, which it takes again.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: Any = None

    def start(self, step: int) -> None:
        """Open the file and keep its lines up to a step.

        Raises:
            UserError: the file cannot be written.
        """
        if dist.get_rank() == 0:
            try:
                aside = self.path.with_suffix(f"{self.path.suffix}.new")
                with open(aside, "w") as kept:
                    self._copy_lines_up_to(step, kept)
                aside.replace(self.path)
                self.file = open(self.path, "a")
            except OSError as error:
                raise self._failure(error) from error

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
        """Add a line.

        Raises:
            UserError: the file cannot be written.
        """
        if self.file:
            try:
                self.file.write(json.dumps(values) + "\n")
                self.file.flush()
            except OSError as error:
                raise self._failure(error) from error

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: cannot be written ({error.strerror or error}); free space there or set run.dir to "
            "another disk, then run again"
        )
