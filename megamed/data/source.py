"""What training and evaluation ask of any source of data.

Shape suffixes: N frames, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """

    item_id: str
    prompt_tokens: list[int]
    visual_positions: list[int]
    frames: list[Frame]
    qa: QA
    judge: Callable[[str], bool]


class MicrobatchSource(Protocol):
    """Packed rows by number, and the pixels of the frames that a rank asks for."""

    def microbatch(self, index: int) -> Microbatch:
        """Row number `index`: a function of the seed and the index alone.

        So a resumed run, or one on another number of ranks, sees the same rows without any state.
        """
        ...

    def load_frames(self, frames: Sequence[Frame]) -> Tensor:
        """frames_NCHW, float32, normalised; nothing but the frames asked for is built."""
        ...

    def held_out(self) -> list[HeldOutItem]:
        """Questions about the held-out part, always the same ones for a config."""
        ...
