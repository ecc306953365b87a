"""A request to save and end, which Slurm makes ahead of a time limit or of pre-emption (`--signal=USR1@300`).

SIGUSR1, not SIGTERM: that one is what torchrun ends ranks with when another has failed, and then there is nothing to
wait for. Of no other module, so that a program can listen from its first moment on.
"""

import os
import signal
from pathlib import Path
from typing import Any

# Whoever started the job is told in this file, if it names one, that there is more to do.
STOP_FILE = "MEGAMED_STOP_FILE"

_came = False


def listen() -> None:
    """From here on a request is noted, and does nothing else. In the main thread."""
    signal.signal(signal.SIGUSR1, _note)


def is_asked() -> bool:
    """Whether this process was asked to stop."""
    return _came


def tell_starter(step: int) -> None:
    """Leave word that the job stopped after a step, and may be started again."""
    if path := os.environ.get(STOP_FILE):
        Path(path).write_text(f"{step}\n")


def _note(signal_number: int, frame: Any) -> None:
    global _came
    _came = True
