"""How far an ingest is: a bar on a terminal, a line every ten seconds in a log. Numbers alone, no names."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any


class Progress:
    """One bar, closed with the context.

    Args:
        what: is counted ("scan").
        unit: of the count ("file").
        total: count at the end, where that is known.
        shown: whether at all.
    """

    def __init__(self, what: str, unit: str, total: int | None, shown: bool):
        from tqdm import tqdm

        stream = sys.stderr  # None where whoever started the program had closed it
        tqdm.set_lock(threading.RLock())  # its own is shared between processes, and starts one that watches it
        self._bar: Any = tqdm(
            total=total,
            desc=what,
            unit=unit,
            dynamic_ncols=True,
            mininterval=0.5 if stream is not None and stream.isatty() else 10.0,
            disable=stream is None or not shown,
        )
        self._began, self._num_slices = time.monotonic(), 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def add(self, count: int = 1, num_slices: int = 0) -> None:
        """So many more, with so many slices."""
        if num_slices:
            self._num_slices += num_slices
            rate = self._num_slices / max(time.monotonic() - self._began, 1e-3)
            self._bar.set_postfix_str(f"{rate:,.0f} slices/s", refresh=False)
        self._bar.update(count)
