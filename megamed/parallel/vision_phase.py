"""The vision phase: every frame of a step is encoded once, by one rank of the model replica.

It is not a pipeline stage. Before the language phase, the frames of all microbatches are dealt out
over every tensor, context and pipeline rank; each rank encodes its own, and one all-to-all takes the
visual tokens to the ranks that hold those positions' embeddings. After the language phase the gradients
return the same way and each rank runs its own frames back. A rank without frames, a microbatch without
frames or a step without any takes part in the same collectives with nothing in its hands.

Shapes: N frames of this rank, K visual tokens of a frame, R rows (visual tokens), H language hidden size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamed.data import Frame, Microbatch
from megamed.parallel.exchange import Exchange, deal_frames, plan_exchange
from megamed.parallel.frame_passes import FramePasses
from megamed.parallel.language_phase import LanguageInput, language_input
from megamed.parallel.sequence import row_order, sequence_shards
from megamed.runtime import Mesh, current_device


class VisionPhase:
    """Encodes a step's frames over the replica, and runs them back.

    Args:
        encoder: frames [N, C, H, W] to rows [N * K, H]; Megatron's DDP around the frame encoder.
        mesh: the layout.
        tokens_per_frame: K.
        hidden_size: H.
        dtype: type of the rows.
        frames_per_pass: frames encoded at once.
        frames_in_flight: most frames of this rank whose activations are alive at any time; None for no bound.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        mesh: Mesh,
        tokens_per_frame: int,
        hidden_size: int,
        dtype: torch.dtype,
        frames_per_pass: int,
        frames_in_flight: int | None,
    ):
        self.mesh = mesh
        self.tokens_per_frame = tokens_per_frame
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.passes = FramePasses(encoder, tokens_per_frame, hidden_size, dtype, frames_per_pass, frames_in_flight)
        self.rank = mesh.replica.rank()
        self._plan: Exchange | None = None
        self._rows: list[Tensor] = []
        self.num_encoded = 0
        """Frames that this rank encoded in the last step."""

    def own_frames(self, microbatches: Sequence[Microbatch]) -> list[Frame]:
        """The frames of a step that this rank encodes, in its order.

        Args:
            microbatches: as for `forward`.
        """
        return [
            frame
            for m, owner in zip(microbatches, self._deal(microbatches), strict=True)
            for frame, rank in zip(m.frames, owner, strict=True)
            if rank == self.rank
        ]

    def own_passes(self, microbatches: Sequence[Microbatch]) -> list[list[Frame]]:
        """The same frames in the portions in which `forward` loads them."""
        return self.passes.split(self.own_frames(microbatches))

    def forward(
        self, microbatches: Sequence[Microbatch], load: Callable[[Sequence[Frame]], Tensor], keep_graph: bool = True
    ) -> list[Tensor]:
        """Encode all frames of a step.

        Args:
            microbatches: this replica's microbatches, the same on each of its ranks.
            load: frames [N, C, H, W] of some references; called with this rank's own frames alone.
            keep_graph: False for evaluation; `backward` must not follow.

        Returns:
            For each microbatch, the rows [R, H] whose positions this rank embeds, frame by frame:
            leaves that collect gradients if `keep_graph`.
        """
        owners = self._deal(microbatches)
        mine = self.own_frames(microbatches)
        self.num_encoded = len(mine)
        encoded = self.passes.forward(mine, load, keep_graph)
        if not any(len(m.frames) for m in microbatches):
            self._plan, self._rows = None, [self._no_rows() for _ in microbatches]
            return self._rows
        places = [row_order(m, self.mesh).place_S[m.visual_positions.numpy()] for m in microbatches]
        shards = [sequence_shards(self.mesh, len(m.tokens_S)) for m in microbatches]
        plan = plan_exchange(owners, places, self.tokens_per_frame, shards, self.rank)
        sent = encoded[_index(plan.send_index)]
        del encoded  # nothing holds rows longer than their way takes
        received = self._all_to_all(sent, plan.send_splits, plan.recv_splits)
        del sent
        rows = received[_index(plan.order)].split(plan.rows_per_microbatch)
        leaves = [r.detach().requires_grad_(keep_graph) for r in rows]
        self._plan, self._rows = (plan, leaves) if keep_graph else (None, [])
        return leaves

    def backward(self, scale: float) -> None:
        """Return the rows' gradients to their encoders and run those back.

        Args:
            scale: multiplies the gradients on the way, for what the language model's gradients are
                scaled by outside autograd (its data-parallel reduction).
        """
        plan, rows = self._plan, self._rows
        self._rows, self._plan = [], None
        if plan is None:
            return
        grads = torch.cat([r.grad if r.grad is not None else torch.zeros_like(r) for r in rows])
        del rows  # and with them their gradients
        by_source = torch.empty_like(grads)
        by_source[_index(plan.order)] = grads
        del grads
        if sum(plan.grad_send_splits) == 0:
            by_source = by_source[:0]
        returned = self._all_to_all(by_source.mul_(scale), plan.grad_send_splits, plan.grad_recv_splits)
        del by_source
        grad = returned[_index(np.argsort(plan.grad_index))]  # each of this rank's rows has one gradient
        del returned
        self.passes.backward(grad)

    def language_inputs(self, microbatches: Sequence[Microbatch], rows: Sequence[Tensor]) -> list[LanguageInput]:
        """Join microbatches and the rows that `forward` returned for them."""
        return [language_input(m, r, self.mesh) for m, r in zip(microbatches, rows, strict=True)]

    def _deal(self, microbatches: Sequence[Microbatch]) -> list[np.ndarray]:
        return deal_frames([len(m.frames) for m in microbatches], self.mesh.replica.size())

    def _all_to_all(self, rows_RH: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        if self.mesh.replica.size() == 1:  # a replica of one rank keeps what it has
            return rows_RH
        output = rows_RH.new_empty(sum(recv_splits), self.hidden_size)
        dist.all_to_all_single(output, rows_RH.contiguous(), recv_splits, send_splits, group=self.mesh.replica)
        return output

    def _no_rows(self) -> Tensor:
        return torch.empty(0, self.hidden_size, dtype=self.dtype, device=current_device())


def _index(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(current_device())
