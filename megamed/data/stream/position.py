"""Packed rows by number, and where in the data a checkpoint stands.

Rows are planned in blocks, one after another: a block takes samples of the mixture until they would fill so many rows,
packs them together with what the block before it left, and shuffles its rows. All of it is decided by the seed and the
data, so every rank plans the same rows, at any number of ranks; what a checkpoint keeps of a block's beginning only
saves planning all blocks before it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamed.data.stream.mixture import Mixture, MixtureState, Pick
from megamed.data.stream.packing import pack_block
from megamed.utils import UserError

# Planned rows that are remembered, some kilobytes each, but never fewer than those of so many steps: the thread that
# prepares steps is ahead of what a checkpoint asks about.
_KEPT_ROWS, _KEPT_STEPS = 4096, 4


@dataclass(frozen=True)
class Size:
    """What a sample takes: its tokens, filled up as the row needs it, and its frames."""

    num_tokens: int
    num_frames: int


@dataclass(frozen=True)
class PlannedRow:
    """The samples of a row, in their order, and their sizes."""

    picks: tuple[Pick, ...]
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class _Start:
    """All that decides a block and those after it.

    Attributes:
        block: its number.
        first_row: number of its first row.
        mixture: before its first sample.
        waiting: samples that the block before left.
    """

    block: int
    first_row: int
    mixture: MixtureState
    waiting: tuple[Pick, ...]


@dataclass(frozen=True)
class _Block:
    start: _Start
    rows: list[PlannedRow]
    next: _Start


class Stream:
    """An endless sequence of packed rows.

    Args:
        mixture: of the data sets.
        measure: the size of a sample; None for one that is passed over.
        capacity: tokens of a row.
        rows_per_block: rows' worth of samples that are packed together.
        max_documents: most samples of a row; None for no bound.
    """

    def __init__(
        self,
        mixture: Mixture,
        measure: Callable[[Pick], Size | None],
        capacity: int,
        rows_per_block: int,
        max_documents: int | None = None,
    ):
        self.mixture, self.measure, self.capacity = mixture, measure, capacity
        self.rows_per_block, self.max_documents = rows_per_block, max_documents
        self._origin = _Start(0, 0, mixture.start(), ())
        self._blocks: list[_Block] = []
        self._kept_rows = _KEPT_ROWS
        self._lock = threading.Lock()  # rows are asked for by the training and by the thread that prepares them

    def row(self, index: int) -> PlannedRow:
        """Row number `index`, in any order; going back far plans again from the start."""
        block = self._block_of(index)
        return block.rows[index - block.start.first_row]

    def rows(self, first: int, count: int) -> list[PlannedRow]:
        """The rows of a step."""
        self._kept_rows = max(self._kept_rows, _KEPT_STEPS * count)
        return [self.row(index) for index in range(first, first + count)]

    def state(self, position: int) -> dict[str, Any]:
        """What `restore` needs to go on at row `position`, JSON-serialisable."""
        block = self._block_of(position)
        start, names = block.start, self.mixture.names
        return {
            "block": start.block,
            "first_row": start.first_row,
            "credit": dict(zip(names, start.mixture.credit, strict=True)),
            "drawn": dict(zip(names, start.mixture.drawn, strict=True)),
            "drawn_after": dict(zip(names, block.next.mixture.drawn, strict=True)),
            "waiting": [f"{p.epoch}.{p.index}.{names[p.dataset]}" for p in start.waiting],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Plan from a block on that an equal stream has planned."""
        names = self.mixture.names
        split = [text.split(".", 2) for text in state["waiting"]]
        waiting = tuple(Pick(names.index(name), int(epoch), int(index)) for epoch, index, name in split)
        mixture = MixtureState(tuple(state["drawn"][n] for n in names), tuple(state["credit"][n] for n in names))
        with self._lock:
            self._origin = _Start(state["block"], state["first_row"], mixture, waiting)
            self._blocks = []

    def go_on(self, state: dict[str, Any], position: int) -> None:
        """Plan from row `position` on, behind the block in which another stream stood, whose data sets differ.

        Data sets that it had go on after the samples that it had drawn of them, the others begin.
        """
        drawn = tuple(state["drawn_after"].get(name, 0) for name in self.mixture.names)
        with self._lock:
            mixture = MixtureState(drawn, self.mixture.start().credit)
            self._origin, self._blocks = _Start(state["block"] + 1, position, mixture, ()), []

    def _block_of(self, index: int) -> _Block:
        with self._lock:
            if self._blocks and index < self._blocks[0].start.first_row:
                self._blocks = []  # forgotten by now
            if index < self._origin.first_row:
                self._origin = _Start(0, 0, self.mixture.start(), ())
            while not self._blocks or index >= self._blocks[-1].next.first_row:
                self._blocks.append(self._plan(self._blocks[-1].next if self._blocks else self._origin))
            while self._blocks[-1].next.first_row - self._blocks[0].next.first_row > self._kept_rows:
                del self._blocks[0]
            return next(block for block in reversed(self._blocks) if block.start.first_row <= index)

    def _plan(self, start: _Start) -> _Block:
        picks = list(start.waiting)
        sizes = [self._size_of_waiting(pick) for pick in picks]
        mixture, num_tokens = start.mixture, 0
        least = self.capacity // self.max_documents if self.max_documents else 0
        while num_tokens < self.rows_per_block * self.capacity:
            dataset, mixture = self.mixture.turn(mixture)
            pick, size, mixture = self._next_of(dataset, mixture)
            picks.append(pick)
            sizes.append(size)
            num_tokens += max(size.num_tokens, least)
        lengths = [size.num_tokens for size in sizes]
        rows, left = pack_block(lengths, len(start.waiting), self.capacity, self.max_documents)
        # Long samples are packed first; shuffled, no step gets them all.
        order = np.random.default_rng((self.mixture.seed, start.block)).permutation(len(rows))
        planned = [
            PlannedRow(tuple(picks[i] for i in rows[r]), tuple(sizes[i] for i in rows[r])) for r in order.tolist()
        ]
        waiting = tuple(picks[i] for i in left)
        after = _Start(start.block + 1, start.first_row + len(planned), mixture, waiting)
        return _Block(start, planned, after)

    def _next_of(self, dataset: int, mixture: MixtureState) -> tuple[Pick, Size, MixtureState]:
        """The next sample of a data set that is not passed over."""
        for _ in range(self.mixture.sizes[dataset]):
            pick, mixture = self.mixture.draw(mixture, dataset)
            size = self.measure(pick)
            if size is not None:
                return pick, size, mixture
        raise UserError(
            f"data set {self.mixture.names[dataset]}: none of its {self.mixture.sizes[dataset]} samples can be used, "
            "all are too long or held out; raise data.seq_length or take it out of data.datasets",
            everywhere=True,
        )

    def _size_of_waiting(self, pick: Pick) -> Size:
        size = self.measure(pick)
        assert size is not None, "a sample that was drawn can be used"
        return size


def differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two fingerprints, as sentence parts ("data.seq_length was 512, is 1024")."""
    found: list[str] = []
    for key in dict.fromkeys([*was, *now]):
        a, b = was.get(key), now.get(key)
        if isinstance(a, dict) or isinstance(b, dict):
            found += differences(a or {}, b or {}, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {_show(a)}, is {_show(b)}")
    return found


def _show(value: Any) -> str:
    return "not there" if value is None else str(value)
