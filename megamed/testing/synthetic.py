"""A source of random microbatches that mixes many-frame, one-frame and text-only documents."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamed.data import FrameRef, HeldOutItem, Microbatch
from megamed.data.source import Cost, take_turns

# Frames of each document, by microbatch: many, one and none, a microbatch without any, and uneven remainders.
MIXED = ((5, 0, 1), (0, 0), (1,), (7, 2))


class SyntheticSource:
    """Random tokens and frames, a pure function of the microbatch's index.

    Args:
        seq_length: tokens of a packed row.
        tokens_per_frame: visual tokens of a frame.
        image_size: side of a frame in pixels.
        vocab_size: tokens to draw from.
        plan: frames of each document, by microbatch; repeated over and over.
        document_multiple: documents are filled up to a multiple of it.
        specialties: of each document, by microbatch; both are repeated over and over.
    """

    def __init__(
        self,
        seq_length: int = 64,
        tokens_per_frame: int = 4,
        image_size: int = 28,
        vocab_size: int = 250,
        plan: Sequence[Sequence[int]] = MIXED,
        document_multiple: int = 1,
        specialties: Sequence[Sequence[int]] = ((0,),),
    ):
        self.seq_length, self.tokens_per_frame = seq_length, tokens_per_frame
        self.image_size, self.vocab_size, self.plan = image_size, vocab_size, plan
        self.document_multiple, self.specialties = document_multiple, specialties

    def microbatch(self, index: int) -> Microbatch:
        """The microbatch with this index."""
        rng = np.random.default_rng((7, index))
        tokens = np.zeros(self.seq_length, np.int64)
        kinds = np.zeros(self.seq_length, np.uint8)
        positions = np.zeros(self.seq_length, np.int64)
        padding = np.ones(self.seq_length, bool)
        called, calls = np.zeros(self.seq_length, np.int64), self.specialties[index % len(self.specialties)]
        visual: list[int] = []
        bounds, cursor, frames = [0], 0, []
        plan = self.plan[index % len(self.plan)]
        for num_frames in plan:
            text = int(rng.integers(5, 9))
            length = text + num_frames * self.tokens_per_frame
            tokens[cursor : cursor + length] = rng.integers(1, self.vocab_size, length)
            padding[cursor : cursor + length] = False
            called[cursor : cursor + length] = calls[(len(bounds) - 1) % len(calls)]
            filled = -(-length // self.document_multiple) * self.document_multiple
            positions[cursor : cursor + filled] = np.arange(filled)
            split = text // 2  # text, frames, then labelled text
            visual += range(cursor + split, cursor + length - (text - split))
            kinds[cursor : cursor + split - 1] = 1
            kinds[cursor + length - (text - split) : cursor + length - 1] = 2
            frames += [
                FrameRef(first=index, num_volumes=num_frames, index=i + 100 * len(bounds)) for i in range(num_frames)
            ]
            cursor += filled
            bounds.append(cursor)
        positions[cursor:] = np.arange(self.seq_length - cursor)
        if cursor < self.seq_length:
            bounds.append(self.seq_length)
        return Microbatch(
            tokens_S=torch.from_numpy(tokens),
            labels_S=torch.from_numpy(np.roll(tokens, -1)),
            loss_kind_S=torch.from_numpy(kinds),
            position_S=torch.from_numpy(positions),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            num_real=int((~padding).sum()),
            padding_S=torch.from_numpy(padding),
            visual_positions=torch.tensor(visual, dtype=torch.int64),
            frames=frames,
            sample_ids=[f"synthetic-{index}.{i}" for i in range(len(plan))],
            specialty_S=torch.from_numpy(called),
        )

    def load_frames(self, frames: Sequence[FrameRef]) -> Tensor:
        """Random pixels [N, 3, size, size], a pure function of each reference."""
        size = self.image_size
        if not frames:
            return torch.empty(0, 3, size, size)
        draws = [np.random.default_rng((11, f.first, f.index)).standard_normal((3, size, size)) for f in frames]
        return torch.from_numpy(np.stack(draws).astype(np.float32))

    def share(self, first: int, count: int, num_shares: int, cost: Cost) -> list[list[int]]:
        return take_turns(first, count, num_shares)

    def state(self, position: int) -> dict[str, Any]:
        return {}

    def restore(self, position: int, state: dict[str, Any]) -> None:
        pass

    def held_out(self) -> list[HeldOutItem]:
        return []
