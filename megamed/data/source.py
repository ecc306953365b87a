"""What training and evaluation ask of any source of data.

Shape suffixes: N frames, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megamed.data.batch import QA, Frame, Microbatch


@dataclass(frozen=True)
class HeldOutItem:
    """One question about data that training never shows.

    Attributes:
        item_id: names the item in logs.
        prompt_tokens: token ids up to the place where the answer begins.
        visual_positions: where the visual tokens stand in the prompt, frame after frame.
        frames: the frames, in the order of their visual tokens.
        qa: the question, its true answer, and the name of its kind.
        judge: whether an answer in a model's words is right.
        specialties: which ones it calls, bit i for the i-th; 0 for none.
    """

    item_id: str
    prompt_tokens: list[int]
    visual_positions: list[int]
    frames: list[Frame]
    qa: QA
    judge: Callable[[str], bool]
    specialties: int = 0


Cost = Callable[[Sequence[int], int], float]
"""What a row costs that has documents of so many tokens each, and so many frames."""


class MicrobatchSource(Protocol):
    """Packed rows by number, and the pixels of the frames that a rank asks for.

    Rows and pixels are asked for by the training and, ahead of it, by a thread.
    """

    def microbatch(self, index: int) -> Microbatch:
        """Row number `index`: a function of the data, the settings and the index alone.

        So a resumed run, or one on another number of ranks, sees the same rows.
        """
        ...

    def load_frames(self, frames: Sequence[Frame]) -> Tensor:
        """frames_NCHW, float32, normalised; nothing but the frames asked for is built."""
        ...

    def share(self, first: int, count: int, num_shares: int, cost: Cost) -> list[list[int]]:
        """Which replica takes which of the rows `first` to `first + count - 1`, as many each: a function of these.

        Args:
            first, count: the rows of a step; `num_shares` divides `count`.
            num_shares: replicas.
            cost: of a row, should the source want to even it out.
        """
        ...

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps of row `position`, the next to be consumed; JSON-serialisable."""
        ...

    def restore(self, position: int, state: dict[str, Any]) -> None:
        """Go on at row `position`; the next rows are those that would have come.

        Raises:
            UserError: the data are not those of the state.
        """
        ...

    def held_out(self) -> list[HeldOutItem]:
        """Questions about the held-out part, always the same ones for a config."""
        ...


def take_turns(first: int, count: int, num_shares: int) -> list[list[int]]:
    """Rows dealt out one after another: what `MicrobatchSource.share` is where rows cost about the same."""
    return [list(range(first + share, first + count, num_shares)) for share in range(num_shares)]
