"""Encodes this rank's frames in passes, and runs them back, with a bound on the frames whose activations are alive.

The first passes keep their activations for the backward pass. Passes beyond the bound are encoded without
a graph; when the gradients are there and the kept passes are gone, each of them is encoded a second time
and run back at once (activation recomputation as in Chen et al., 2016, arXiv:1604.06174, with a pass as the
segment). The encoder draws no random numbers, so the second time gives the same rows.

Pixels of the passes to recompute stay in the host's memory rather than being loaded again: a frame's are less than
half of its visual tokens (InternVL-26B in bf16: 1.2 of 3.1 MB), which the language phase holds anyway; reading
and resizing a study twice would cost as much as the first time, at a moment when nothing hides it; and a source
that augments frames need not be able to repeat itself.

Shapes: N frames, C channels, H and W pixels of a frame; K visual tokens of a frame; R = N * K rows, D their width.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megamed.data import Frame
from megamed.runtime import Stopwatch, current_device


@dataclass(frozen=True)
class _Pass:
    """Frames that were encoded together, until they are run back."""

    rows: slice
    kept: GradientEdge | Tensor
    """The end of its graph or, for a pass that is encoded again, its pixels [N, C, H, W] on the host."""


class FramePasses:
    """Encodes frames and runs them back.

    Args:
        encoder: frames [N, C, H, W] to rows [N * K, D]; gradients are accumulated by its parameters' own hooks.
        tokens_per_frame: K.
        hidden_size: D.
        dtype: type of pixels and rows.
        frames_per_pass: frames encoded at once.
        frames_in_flight: most frames whose activations are alive at any time; None for no bound. A pass is never
            larger.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        tokens_per_frame: int,
        hidden_size: int,
        dtype: torch.dtype,
        frames_per_pass: int,
        frames_in_flight: int | None,
    ):
        self.encoder = encoder
        self.tokens_per_frame = tokens_per_frame
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.frames_per_pass = min(frames_per_pass, frames_per_pass if frames_in_flight is None else frames_in_flight)
        self.frames_in_flight = frames_in_flight
        self.stopwatch: Stopwatch | None = None
        """Sums the time of the passes that `backward` follows; whoever sets it takes what it sums."""
        self._passes: list[_Pass] = []

    def split(self, frames: Sequence[Frame]) -> list[list[Frame]]:
        """The passes that `forward` encodes frames in."""
        return [
            list(frames[start : start + self.frames_per_pass]) for start in range(0, len(frames), self.frames_per_pass)
        ]

    def forward(
        self, frames: Sequence[Frame], load: Callable[[Sequence[Frame]], Tensor], keep_graph: bool = True
    ) -> Tensor:
        """Encode frames.

        Args:
            frames: what to encode; each is loaded once.
            load: pixels [N, C, H, W] of some references, on the host or on the device.
            keep_graph: False if `backward` will not follow.

        Returns:
            Rows [R, D] in the frames' order, outside the autograd graph and not kept here.
        """
        self._passes = []
        rows_RD = torch.empty(
            len(frames) * self.tokens_per_frame, self.hidden_size, dtype=self.dtype, device=current_device()
        )
        stop = 0
        for portion in self.split(frames):
            start, stop = stop, stop + len(portion)
            region = slice(start * self.tokens_per_frame, stop * self.tokens_per_frame)
            pixels_NCHW = load(portion).to(current_device(), non_blocking=True).to(self.dtype)
            with_graph = keep_graph and (self.frames_in_flight is None or stop <= self.frames_in_flight)
            with self.stopwatch.running() if self.stopwatch and keep_graph else nullcontext():
                encoded_RD = self._encode(pixels_NCHW, with_graph)
            rows_RD[region] = encoded_RD.detach()
            if keep_graph:  # of a graph the end alone: the rows themselves are where the caller wants them
                kept = get_gradient_edge(encoded_RD) if with_graph else _on_host(pixels_NCHW)
                self._passes.append(_Pass(region, kept))
        return rows_RD

    def backward(self, grad_RD: Tensor) -> None:
        """Run the frames of the last `forward` back, pass by pass in their order.

        One pass at a time, so that a weight's gradient goes to its fp32 sum before the next pass has one.

        Args:
            grad_RD: gradients of the rows that `forward` returned.
        """
        passes, self._passes = self._passes[::-1], []
        while passes:
            one = passes.pop()  # its graph is gone before the next pass is encoded again
            end = self._encode(one.kept, with_graph=True) if isinstance(one.kept, Tensor) else one.kept
            torch.autograd.backward(end, grad_RD[one.rows])

    def _encode(self, pixels_NCHW: Tensor, with_graph: bool) -> Tensor:
        with torch.set_grad_enabled(with_graph):
            return self.encoder(pixels_NCHW.to(current_device(), non_blocking=True))


def _on_host(pixels_NCHW: Tensor) -> Tensor:
    """The pixels in the host's memory, whence they come back without a detour."""
    if pixels_NCHW.device.type == "cpu":
        return pixels_NCHW
    if pixels_NCHW.is_meta:
        return torch.empty_like(pixels_NCHW, device="cpu")  # memory that nobody touches is none
    return torch.empty_like(pixels_NCHW, device="cpu", pin_memory=True).copy_(pixels_NCHW, non_blocking=True)
