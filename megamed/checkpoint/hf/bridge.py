"""Tensors of a Hugging Face folder as ours, and ours as theirs, one at a time, as tables say. Knows no family.

Memory: one of our parameters, and on the way out one of theirs beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megamed.checkpoint.hf.names import Stored
from megamed.checkpoint.hf.source import Source
from megamed.checkpoint.spans import Span
from megamed.checkpoint.weights import Weights
from megamed.models.weight_map import MISSING, Found, Rows, Table, check_rows
from megamed.utils import UserError


class Incoming:
    """The tensors of a Hugging Face folder as our parameters.

    Args:
        source: the folder.
        table: of its family and model.
    """

    def __init__(self, source: Source, table: Table):
        self.source, self.table = source, table

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the folder has all that a model needs, of the right shapes, and nothing else.

        Args:
            shapes: of the model's parameters, whole, by name.

        Raises:
            UserError: names the tensor, and what is wrong with it.
        """
        wanted: set[str] = set()
        for name, shape in shapes.items():
            found = self._line(name)
            sizes = found.line.joined(shape[0]).sizes()
            for theirs, rows in zip(found.theirs, sizes, strict=True):
                if theirs not in self.source:
                    raise UserError(f"{self.source.folder}: lacks {theirs}, a part of {name}: {MISSING}")
                has = self.source.shape(theirs)
                check_rows(found, f"{self.source.folder}: {theirs}", has[0] if has else 0, rows)
                if has[1:] != shape[1:]:
                    raise UserError(
                        f"{self.source.folder}: {theirs} has the shape {has}, and {(rows, *shape[1:])} follows from "
                        "config.json; download both again"
                    )
                wanted.add(theirs)
        for theirs in self.source.names:
            other = self.table.repeats.get(theirs)
            if other is not None:
                self._check_repeat(theirs, other)
            elif theirs not in wanted and not self.table.is_left_out(theirs):
                raise UserError(
                    f"{self.source.folder}: has {theirs}, which a model of its config.json has no place for; check "
                    "that both are of one release"
                )

    def dtype(self, name: str) -> torch.dtype:
        """Type of a parameter.

        Raises:
            UserError: its parts have different types.
        """
        types = {theirs: self.source.dtype(theirs) for theirs in self._line(name).theirs}
        if len(set(types.values())) > 1:
            listed = ", ".join(f"{theirs} {dtype}" for theirs, dtype in types.items())
            raise UserError(f"{self.source.folder}: parts of {name} have different types ({listed}); make them one")
        return next(iter(types.values()))

    def fill(self, name: str, num_rows: int, offsets: tuple[int, ...], out: Tensor) -> None:
        """Read a part of a parameter; of the files, only the bytes that it has.

        Args:
            name: of the parameter.
            num_rows: of the whole parameter.
            offsets: where the part begins, along all axes.
            out: takes it; on any device, of any type.
        """
        found = self._line(name)
        region = tuple(slice(start, start + size) for start, size in zip(offsets[1:], out.shape[1:], strict=True))
        first, last = offsets[0], offsets[0] + len(out)
        covered = 0
        for rows in found.line.joined(num_rows).rows():
            start, stop = max(rows.ours, first), min(rows.ours + rows.count, last)
            if start < stop:
                theirs = slice(rows.theirs + start - rows.ours, rows.theirs + stop - rows.ours)
                self.source.read_into(found.theirs[rows.part], theirs, out[start - first : stop - first], region)
                covered = max(covered, stop - first)
        out[covered:].zero_()  # words that the vocabulary is padded with

    def spans(self, name: str, num_rows: int, first: int, last: int) -> list[Span] | None:
        """Where rows of a parameter are in the files; those that none covers are zeros. None: they are in pickles.

        Args:
            name: of the parameter.
            num_rows: of the whole parameter.
            first, last: which rows, to before the last.
        """
        found, spans = self._line(name), []
        for rows in found.line.joined(num_rows).rows():
            start, stop = max(rows.ours, first), min(rows.ours + rows.count, last)
            if start < stop:
                begin = rows.theirs + start - rows.ours
                span = self.source.span(found.theirs[rows.part], begin, begin + stop - start, start - first)
                if span is None:
                    return None
                spans.append(span)
        return spans

    def _line(self, name: str) -> Found:
        found = self.table.of_ours(name)
        if found is None:
            raise UserError(
                f"{self.source.folder}: models of this format have no {name}, which follows from the settings of yours"
            )
        return found

    def _check_repeat(self, name: str, other: str) -> None:
        """A tied output layer may be in a file beside the embedding; then they have to be the same."""
        if self.source.shape(name) != self.source.shape(other) or self.source.dtype(name) != self.source.dtype(other):
            raise UserError(f"{self.source.folder}: {name} is tied to {other}, and has another shape or type")
        num_rows, step = self.source.shape(name)[0], 4096
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            one, two = (self._rows(theirs, rows) for theirs in (name, other))
            if not same_bits(one, two):
                raise UserError(
                    f"{self.source.folder}: config.json says that {name} is tied to {other}, and they differ; set "
                    "tie_word_embeddings to false there"
                )

    def _rows(self, name: str, rows: slice) -> Tensor:
        out = torch.empty(rows.stop - rows.start, *self.source.shape(name)[1:], dtype=self.source.dtype(name))
        self.source.read_into(name, rows, out, tuple(slice(0, size) for size in out.shape[1:]))
        return out


@dataclass
class Outgoing:
    """Our parameters in a checkpoint as tensors of a Hugging Face folder.

    Attributes:
        weights: the checkpoint.
        table: of the family and model.
        parameters: the checkpoint's, by name.
    """

    weights: Weights
    table: Table
    parameters: Mapping[str, Stored]

    def __post_init__(self) -> None:
        # Of a fused parameter several of theirs are made one after the other; parameters in between are small.
        self._kept: dict[str, Tensor] = {}
        self._most = max((_bytes(x, self.weights) for x in self.parameters.values()), default=0)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each of their tensors, by name.

        Raises:
            UserError: a parameter has no counterpart.
        """
        found_shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, x in self.parameters.items():
            found = self.table.of_ours(name)
            if found is None:
                raise UserError(f"{self.weights.checkpoint}: {name} has no counterpart in the format asked for")
            dtype = self.weights.dtype(x.name)
            for theirs, rows in zip(found.theirs, found.line.joined(x.shape[0]).sizes(), strict=True):
                found_shapes[theirs] = ((rows, *x.shape[1:]), dtype)
        return found_shapes

    def make(self, theirs: str) -> Tensor:
        """One of their tensors, in the type that it is stored in.

        Raises:
            UserError: there is none of that name.
        """
        found = self.table.of_theirs(self.table.repeats.get(theirs, theirs))
        if found is None or found.ours not in self.parameters:
            raise UserError(f"{self.weights.checkpoint}: has nothing that {theirs} could be made of")
        ours = self._read(found.ours)
        join = found.line.joined(len(ours))
        rows = [x for x in join.rows() if x.part == found.part]
        if len(rows) == 1:
            return ours[rows[0].ours : rows[0].ours + rows[0].count]
        tensor = ours.new_empty(join.sizes()[found.part], *ours.shape[1:])
        for x in rows:
            _copy(x, ours, tensor)
        return tensor

    def dtype(self, theirs: str) -> torch.dtype | None:
        """Type in which the checkpoint has what one of their tensors is made of; None if it has nothing."""
        found = self.table.of_theirs(self.table.repeats.get(theirs, theirs))
        if found is None or found.ours not in self.parameters:
            return None
        return self.weights.dtype(self.parameters[found.ours].name)

    def spans(self, theirs: str) -> list[Span] | None:
        """Where the bytes of one of their tensors are in the checkpoint; None if it has to be made."""
        found = self.table.of_theirs(self.table.repeats.get(theirs, theirs))
        if found is None or found.ours not in self.parameters:
            return None
        x, spans = self.parameters[found.ours], []
        for rows in found.line.joined(x.shape[0]).rows():
            if rows.part == found.part:
                parts = self.weights.spans(x.name, x.stack, rows.ours, rows.ours + rows.count, rows.theirs)
                if parts is None:
                    return None
                spans += parts
        return sorted(spans, key=lambda span: span.place)

    def _read(self, name: str) -> Tensor:
        if name not in self._kept:
            x = self.parameters[name]
            room = self._most - _bytes(x, self.weights)
            while self._kept and sum(map(_size, self._kept.values())) > room:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self.weights.read(x.name, *x.stack)
        return self._kept[name]


def _copy(rows: Rows, ours: Tensor, theirs: Tensor) -> None:
    theirs[rows.theirs : rows.theirs + rows.count] = ours[rows.ours : rows.ours + rows.count]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(x: Stored, weights: Weights) -> int:
    return torch.Size(x.shape).numel() * weights.dtype(x.name).itemsize


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors of one shape and type are the same, NaN by NaN and zero by zero."""
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))

