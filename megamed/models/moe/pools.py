"""Named pools of experts: which expert belongs to which pool, whatever the layout.

Experts are numbered so that any contiguous part of them that an expert-parallel rank holds has the same share of
every pool: expert i of a pool of n stands at the fraction i / n of the numbers. With any number of ranks that divides
the sizes of all pools, rank r then holds the r-th part of each pool, and a batch that calls one pool alone loads all
ranks alike. The numbering depends on the sizes alone, so Megatron's experts, dispatchers and checkpoints need not
know of pools, and a checkpoint is readable at any layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from megamed.data.specialties import GENERAL


@dataclass(frozen=True)
class Pools:
    """The pools of one model, in the order of its configuration.

    Attributes:
        sizes: number of experts by name of the pool; one anonymous pool, named `general`, for a plain
            mixture of experts.
    """

    sizes: Mapping[str, int]

    def __str__(self) -> str:
        """Names and sizes, as on a command line."""
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())

    @property
    def names(self) -> tuple[str, ...]:
        """All pools."""
        return tuple(self.sizes)

    @cached_property
    def specialties(self) -> tuple[str, ...]:
        """The pools that a study calls: bit i of a token's specialties is the i-th of these."""
        return tuple(name for name in self.sizes if name != GENERAL)

    @property
    def num_experts(self) -> int:
        """Experts of all pools."""
        return sum(self.sizes.values())

    @cached_property
    def order(self) -> tuple[tuple[str, int], ...]:
        """By number of the expert: its pool, and its number in it."""
        position = {name: place for place, name in enumerate(self.sizes)}
        members = [(name, i) for name, size in self.sizes.items() for i in range(size)]
        return tuple(sorted(members, key=lambda m: (Fraction(m[1], self.sizes[m[0]]), position[m[0]])))

    @cached_property
    def members(self) -> dict[str, tuple[int, ...]]:
        """Numbers of each pool's experts, in the pool's order."""
        found: dict[str, list[int]] = {name: [] for name in self.sizes}
        for number, (name, _) in enumerate(self.order):
            found[name].append(number)
        return {name: tuple(numbers) for name, numbers in found.items()}

    def bits(self, *names: str) -> int:
        """The specialties of these names as one number; general has no bit."""
        return sum(1 << self.specialties.index(name) for name in names if name != GENERAL)
