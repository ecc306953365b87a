"""Tables of a published format's parameters and ours, and what carries them out on whole state dicts.

A line of a table says which of their tensors make one of ours, and where their rows are in it. Rows suffice: whatever
is fused (q, k and v; gate and up), padded (the vocabulary) or taken apart (experts) is so along the first axis. Values
are only renamed and moved, so the way there and back is exact. A family's `hf.py` holds its table; code that reads
tables knows no family.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from megamed.utils import UserError

MISSING = "check that all its files are there"


@dataclass(frozen=True)
class Rows:
    """Rows of one of their tensors that are rows of ours.

    Attributes:
        part: which of a line's tensors.
        theirs: first row in it.
        ours: first row in ours.
        count: how many.
    """

    part: int
    theirs: int
    ours: int
    count: int


class Join(Protocol):
    """How the rows of their tensors lie in ours."""

    def num_rows(self) -> int:
        """Rows of ours."""

    def sizes(self) -> tuple[int, ...]:
        """Rows of each of theirs."""

    def rows(self) -> Iterator[Rows]:
        """Which are which; rows of ours that none covers are zeros."""


@dataclass(frozen=True)
class Grouped:
    """Ours goes by group, and in each of them first rows of the first of theirs, then of the second, and so on.

    Attributes:
        groups: key/value heads.
        widths: rows of each of theirs in a group.
        fused: theirs are one tensor after all, one after the other.
    """

    groups: int
    widths: tuple[int, ...]
    fused: bool = False

    def num_rows(self) -> int:
        return self.groups * sum(self.widths)

    def sizes(self) -> tuple[int, ...]:
        return (self.num_rows(),) if self.fused else tuple(self.groups * width for width in self.widths)

    def rows(self) -> Iterator[Rows]:
        for group in range(self.groups):
            ours = group * sum(self.widths)
            for part, width in enumerate(self.widths):
                theirs = group * width
                if self.fused:
                    part, theirs = 0, self.groups * sum(self.widths[:part]) + theirs
                yield Rows(part, theirs, ours, width)
                ours += width


@dataclass(frozen=True)
class Padded:
    """Ours has further rows behind theirs."""

    real: int
    padded: int

    def num_rows(self) -> int:
        return self.padded

    def sizes(self) -> tuple[int, ...]:
        return (self.real,)

    def rows(self) -> Iterator[Rows]:
        yield Rows(0, 0, 0, self.real)


@dataclass(frozen=True)
class Equal:
    """Theirs are as large as each other, and ours is one after the other."""

    parts: int
    total: int

    def num_rows(self) -> int:
        return self.total

    def sizes(self) -> tuple[int, ...]:
        return (self.total // self.parts,) * self.parts

    def rows(self) -> Iterator[Rows]:
        size = self.total // self.parts
        for part in range(self.parts):
            yield Rows(part, 0, part * size, size)


@dataclass(frozen=True)
class Line:
    """One of our parameters, or the same one of every layer or expert.

    Attributes:
        ours: its name, as in the module's state dict; `{i}` stands for a layer's number, `{e}` for an expert's.
        theirs: names of the tensors it is made of.
        join: how; None for one after the other, in equal parts.
        keys: settings that decide about the number of rows, for messages.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Join | None = None
    keys: str = "the sizes"

    def joined(self, num_rows: int) -> Join:
        """How theirs lie in ours, which has so many rows."""
        return self.join or Equal(len(self.theirs), num_rows)


@dataclass(frozen=True)
class Found:
    """The line that a name belongs to.

    Attributes:
        line: of the table.
        part: which of its tensors a name of theirs is.
        numbers: what stands for `{i}` and `{e}`.
    """

    line: Line
    part: int
    numbers: Mapping[str, str]

    @property
    def ours(self) -> str:
        """Our name."""
        return self.line.ours.format(**self.numbers)

    @property
    def theirs(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name.format(**self.numbers) for name in self.line.theirs)


@dataclass(frozen=True)
class Table:
    """All parameters of a model.

    Attributes:
        lines: of the table.
        repeats: their names of tensors that a file may have and that repeat another of theirs (a tied output layer).
        left_out: what their names end with where they are no weights, but follow from the configuration.
    """

    lines: tuple[Line, ...]
    repeats: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(
            self.lines + other.lines, {**self.repeats, **other.repeats}, (*self.left_out, *other.left_out)
        )

    def within(self, ours: str, theirs: str) -> "Table":
        """The same table of a part of a larger model.

        Args:
            ours: what our names begin with there.
            theirs: what their names begin with there.
        """
        lines = tuple(
            replace(line, ours=ours + line.ours, theirs=tuple(theirs + name for name in line.theirs))
            for line in self.lines
        )
        repeats = {theirs + name: theirs + other for name, other in self.repeats.items()}
        return Table(lines, repeats, self.left_out)

    def renamed(self, beginnings: Mapping[str, str]) -> "Table":
        """The same table of files that begin their names otherwise.

        Args:
            beginnings: of their names here, and what they are there; the first that fits counts.
        """

        def new(name: str) -> str:
            for old, other in beginnings.items():
                if name.startswith(old):
                    return other + name.removeprefix(old)
            return name

        lines = tuple(replace(line, theirs=tuple(map(new, line.theirs))) for line in self.lines)
        return replace(self, lines=lines, repeats={new(name): new(other) for name, other in self.repeats.items()})

    def of_ours(self, name: str) -> Found | None:
        """The line of one of our parameters."""
        return _first(self._ours, name)

    def of_theirs(self, name: str) -> Found | None:
        """The line of one of their tensors."""
        return _first(self._theirs, name)

    def is_left_out(self, name: str) -> bool:
        """Whether one of their tensors is none of ours, and none is missed."""
        return name.endswith(self.left_out)

    @cached_property
    def _ours(self) -> "_Index":
        return _index((line.ours, line, 0) for line in self.lines)

    @cached_property
    def _theirs(self) -> "_Index":
        return _index((name, line, part) for line in self.lines for part, name in enumerate(line.theirs))


_Index = dict[str, list[tuple[re.Pattern[str], Line, int]]]
_NUMBER = re.compile(r"\d+")


def _index(patterns: Iterable[tuple[str, Line, int]]) -> _Index:
    """Lines by their names without numbers, since large models have tens of thousands of names."""
    index: _Index = {}
    for pattern, line, part in patterns:
        regex = re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(pattern)))
        index.setdefault(_NUMBER.sub("#", re.sub(r"\{\w\}", "#", pattern)), []).append((regex, line, part))
    return index


def _first(index: _Index, name: str) -> Found | None:
    for regex, line, part in index.get(_NUMBER.sub("#", name), ()):
        if found := regex.fullmatch(name):
            return Found(line, part, found.groupdict())
    return None


def to_ours(table: Table, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the other format to ours.

    Raises:
        UserError: a name is not in the table, a part of one of our parameters is missing, or a size is another.
    """
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    lines: dict[str, Found] = {}
    for name, tensor in state_dict.items():
        if name in table.repeats or table.is_left_out(name):
            continue
        found = table.of_theirs(name)
        if found is None:
            raise UserError(f"{name} in the checkpoint is unknown to this model family: check the model type")
        lines[found.ours] = found
        parts.setdefault(found.ours, {})[found.part] = (name, tensor)
    return {ours: _join(lines[ours], tensors) for ours, tensors in parts.items()}


def to_theirs(table: Table, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of ours to the other format: the inverse of `to_ours`.

    Raises:
        UserError: a name is not in the table.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        found = table.of_ours(name)
        if found is None:
            raise UserError(f"{name} has no counterpart in the format asked for: check the model type")
        join = found.line.joined(len(tensor))
        tensors = [tensor.new_empty(size, *tensor.shape[1:]) for size in join.sizes()]
        for rows in join.rows():
            tensors[rows.part][rows.theirs : rows.theirs + rows.count] = tensor[rows.ours : rows.ours + rows.count]
        result |= zip(found.theirs, tensors, strict=True)
    return result


def _join(found: Found, tensors: Mapping[int, tuple[str, Tensor]]) -> Tensor:
    for part, name in enumerate(found.theirs):
        if part not in tensors:
            raise UserError(f"the checkpoint lacks {name}, a part of {found.ours}: {MISSING}")
    join = found.line.joined(sum(len(tensor) for _, tensor in tensors.values()))
    for part, size in enumerate(join.sizes()):
        check_rows(found, tensors[part][0], len(tensors[part][1]), size)
    first = tensors[0][1]
    ours = first.new_zeros(join.num_rows(), *first.shape[1:])
    for rows in join.rows():
        ours[rows.ours : rows.ours + rows.count] = tensors[rows.part][1][rows.theirs : rows.theirs + rows.count]
    return ours


def check_rows(found: Found, name: str, has: int, wanted: int) -> None:
    """Check the rows of one of their tensors.

    Raises:
        UserError: it has others than the model's settings say.
    """
    if has != wanted:
        raise UserError(f"{name} has {has} rows in the checkpoint, {wanted} by the model: check {found.line.keys}")
