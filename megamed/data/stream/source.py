"""Packed training rows out of a volume store and files of samples."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megamed.data.batch import Microbatch, pack
from megamed.data.frames import FrameLoader
from megamed.data.source import Cost, HeldOutItem
from megamed.data.stream.balance import even_shares
from megamed.data.stream.chat import ShownFrame
from megamed.data.stream.datasets import DataSet, Draft
from megamed.data.stream.documents import Documents
from megamed.data.stream.held_out import HeldOutSeries
from megamed.data.stream.mixture import Mixture, Pick
from megamed.data.stream.position import PlannedRow, Size, Stream, differences
from megamed.utils import UserError

log = logging.getLogger("megamed.data")

# Of the samples that are looked at before training begins, so many are looked at with their pictures.
_SHOWN_WHEN_CHECKED = 16


@dataclass(frozen=True)
class StreamOptions:
    """How documents become rows.

    Attributes:
        seed: decides every draw.
        document_multiple: documents are filled up to a multiple of it; see `pack`.
        rows_per_block: rows' worth of samples that are packed together.
        max_documents: most samples of a row; None for no bound.
        accept_changes: go on from a checkpoint though the data or their settings have changed.
    """

    seed: int
    document_multiple: int
    rows_per_block: int
    max_documents: int | None
    accept_changes: bool


class StudySource:
    """A `MicrobatchSource` over data sets whose samples show series, films and pictures.

    Args:
        datasets: where samples come from.
        weights: of each.
        documents: makes documents of samples.
        make_loader: makes what makes pixels of frames; called when the first are asked for.
        options: how documents become rows.
        held_out: what is asked about the part that training never shows; None for nothing.
        settings: what else decides which rows come, by key: their change is noticed when a run goes on.
    """

    def __init__(
        self,
        datasets: Sequence[DataSet],
        weights: Sequence[float],
        documents: Documents,
        make_loader: Callable[[], FrameLoader],
        options: StreamOptions,
        held_out: HeldOutSeries | None,
        settings: dict[str, Any],
    ):
        self._datasets, self._documents, self._options = datasets, documents, options
        self._weights, self._held_out, self._make_loader = weights, held_out, make_loader
        self._loader: FrameLoader | None = None
        names = [dataset.name for dataset in datasets]
        mixture = Mixture(names, [len(dataset) for dataset in datasets], weights, options.seed)
        self._stream = Stream(
            mixture, self._measure, documents.seq_length, options.rows_per_block, options.max_documents
        )
        self._settings = settings
        self._lock = threading.Lock()

    def microbatch(self, index: int) -> Microbatch:
        """Row number `index`."""
        row = self._stream.row(index)
        found = [self._document(pick) for pick in row.picks]
        documents = [document for document in found if document is not None]
        assert len(documents) == len(row.picks), "a sample that was planned has a document"
        pad_id, multiple = self._documents.writer.tokenizer.pad_id, self._options.document_multiple
        return pack(documents, self._documents.seq_length, pad_id, multiple)

    def load_frames(self, frames: Sequence[ShownFrame]) -> Tensor:
        """frames_NCHW, float32, normalised."""
        with self._lock:
            loader = self._loader = self._loader or self._make_loader()
        return loader.load([frame.frame for frame in frames], [frame.seed for frame in frames])

    def share(self, first: int, count: int, num_shares: int, cost: Cost) -> list[list[int]]:
        """Rows of nearly equal cost in all, as many each."""
        costs = [cost([s.num_tokens for s in row.sizes], sum(s.num_frames for s in row.sizes))
                 for row in self._stream.rows(first, count)]
        return [[first + index for index in share] for share in even_shares(costs, num_shares)]

    def state(self, position: int) -> dict[str, Any]:
        """The block that row `position` is in, and what must be as it was for that to mean the same rows."""
        return {**self._stream.state(position), "fingerprint": self._fingerprint()}

    def restore(self, position: int, state: dict[str, Any]) -> None:
        """Go on at row `position`.

        Raises:
            UserError: data or settings have changed.
        """
        if not state:
            return
        changes = differences(state["fingerprint"], self._fingerprint())
        if not changes:
            self._stream.restore(state)
        elif self._options.accept_changes:
            log.warning("the data have changed since the checkpoint (%s): going on with new rows", "; ".join(changes))
            self._stream.go_on(state, position)
        else:
            raise UserError(
                f"the data have changed since the checkpoint ({'; '.join(changes[:3])}); set them back, go on with "
                "other rows by data.accept_changes=true, or start a new run with run.name=NAME",
                everywhere=True,
            )

    def held_out(self) -> list[HeldOutItem]:
        """Questions about the series that training never shows."""
        return self._held_out.items(self._documents, self._options.seed) if self._held_out else []

    def check(self, count: int) -> None:
        """Look at samples of each data set, spread over it: at up to `count` lines, and at what some of them show.

        Raises:
            UserError: one cannot be used.
        """
        for dataset in self._datasets:
            places = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist()
            shown = set(places[:: max(1, len(places) // _SHOWN_WHEN_CHECKED)])
            for index in places:
                draft = dataset.draft(index, 0)
                if draft is not None:
                    self._documents.called(draft)
                if draft is not None and index in shown:
                    self._documents.shown(draft)

    def planned(self, index: int) -> PlannedRow:
        """Which samples row number `index` holds, and their sizes, without making it."""
        return self._stream.row(index)

    def _draft(self, pick: Pick) -> Draft | None:
        return self._datasets[pick.dataset].draft(pick.index, pick.epoch)

    def _document(self, pick: Pick) -> Any:
        draft = self._draft(pick)
        if draft is None:
            return None
        key = (self._options.seed, zlib.crc32(self._datasets[pick.dataset].name.encode()), pick.epoch, pick.index)
        return self._documents.document(draft, int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _measure(self, pick: Pick) -> Size | None:
        document = self._document(pick)
        if document is None:
            return None
        multiple = self._options.document_multiple
        return Size(-(-len(document.tokens) // multiple) * multiple, len(document.frames))

    def _fingerprint(self) -> dict[str, Any]:
        pairs = zip(self._datasets, self._weights, strict=True)
        return {**self._settings, "data sets": {d.name: {**d.fingerprint(), "weight": weight} for d, weight in pairs}}
