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

from megamed.data import FrameRef, Microbatch
from megamed.parallel.exchange import Exchange, Shard, deal_frames, plan_exchange
from megamed.parallel.language_phase import LanguageInput, language_input
from megamed.runtime import Mesh, current_device


def sequence_shards(mesh: Mesh, seq_length: int) -> list[Shard]:
    """Each replica rank's part of the packed row's embeddings, by rank in the replica."""
    tensor, split = mesh.config.tensor, mesh.config.sequence and mesh.config.tensor > 1
    shards = []
    for rank in range(mesh.replica.size()):
        t = rank % tensor
        if rank >= tensor * mesh.config.context:  # past the first pipeline stage: no embeddings
            shards.append(Shard(0, 0, False))
        elif split:
            length = seq_length // tensor
            shards.append(Shard(t * length, (t + 1) * length, True))
        else:
            shards.append(Shard(0, seq_length, t == 0))
    return shards


class VisionPhase:
    """Encodes a step's frames over the replica, and runs them back.

    Args:
        encoder: frames [N, C, H, W] to rows [N * K, H]; Megatron's DDP around the frame encoder.
        mesh: the layout.
        seq_length: tokens of a packed row.
        tokens_per_frame: K.
        hidden_size: H.
        dtype: type of the rows.
        frames_per_pass: frames encoded at once.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        mesh: Mesh,
        seq_length: int,
        tokens_per_frame: int,
        hidden_size: int,
        dtype: torch.dtype,
        frames_per_pass: int,
    ):
        self.encoder = encoder
        self.mesh = mesh
        self.tokens_per_frame = tokens_per_frame
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.frames_per_pass = frames_per_pass
        self.shards = sequence_shards(mesh, seq_length)
        self.rank = mesh.replica.rank()
        self._passes: list[Tensor] = []
        self._plan: Exchange | None = None
        self._rows: list[Tensor] = []
        self.num_encoded = 0
        """Frames that this rank encoded in the last step."""

    def forward(
        self, microbatches: Sequence[Microbatch], load: Callable[[Sequence[FrameRef]], Tensor], keep_graph: bool = True
    ) -> list[Tensor]:
        """Encode all frames of a step.

        Args:
            microbatches: this replica's microbatches, the same on each of its ranks.
            load: frames [N, C, H, W] of some references; called with this rank's own frames alone.
            keep_graph: False for evaluation; `backward` must not follow.

        Returns:
            For each microbatch, the rows [R, H] whose positions this rank embeds, in order of position:
            leaves that collect gradients if `keep_graph`.
        """
        owners = deal_frames([len(m.frames) for m in microbatches], len(self.shards))
        mine = [
            frame
            for m, owner in zip(microbatches, owners, strict=True)
            for frame, rank in zip(m.frames, owner, strict=True)
            if rank == self.rank
        ]
        self.num_encoded = len(mine)
        self._passes = [
            self.encoder(load(mine[i : i + self.frames_per_pass]).to(current_device(), self.dtype))
            for i in range(0, len(mine), self.frames_per_pass)
        ]
        if not any(len(m.frames) for m in microbatches):
            self._plan, self._rows = None, [self._no_rows() for _ in microbatches]
            return self._rows
        plan = plan_exchange(
            owners, [m.visual_positions.numpy() for m in microbatches], self.tokens_per_frame, self.shards, self.rank
        )
        encoded = torch.cat([p.detach() for p in self._passes]) if self._passes else self._no_rows()
        received = self._all_to_all(encoded[_index(plan.send_index)], plan.send_splits, plan.recv_splits)
        rows = received[_index(plan.order)].split(plan.rows_per_microbatch)
        self._plan = plan
        self._rows = [r.detach().requires_grad_(keep_graph) for r in rows]
        return self._rows

    def backward(self, scale: float) -> None:
        """Return the rows' gradients to their encoders and run those back.

        Args:
            scale: multiplies the gradients on the way, for what the language model's gradients are
                scaled by outside autograd (its data-parallel reduction).
        """
        plan, passes = self._plan, self._passes
        if plan is not None:
            grads = torch.cat([r.grad if r.grad is not None else torch.zeros_like(r) for r in self._rows])
            by_source = torch.empty_like(grads)
            by_source[_index(plan.order)] = grads
            if sum(plan.grad_send_splits) == 0:
                by_source = by_source[:0]
            returned = self._all_to_all(by_source * scale, plan.grad_send_splits, plan.grad_recv_splits)
            if passes:
                grad = returned.new_zeros(sum(len(p) for p in passes), self.hidden_size)
                grad[_index(plan.grad_index)] = returned
                torch.autograd.backward(passes, list(grad.split([len(p) for p in passes])))
        self._passes, self._rows, self._plan = [], [], None

    def language_inputs(self, microbatches: Sequence[Microbatch], rows: Sequence[Tensor]) -> list[LanguageInput]:
        """Join microbatches and the rows that `forward` returned for them."""
        shard = self.shards[self.rank]
        return [language_input(m, r, shard, self.mesh) for m, r in zip(microbatches, rows, strict=True)]

    def _all_to_all(self, rows_RH: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        if len(self.shards) == 1:  # a replica of one rank keeps what it has
            return rows_RH
        output = rows_RH.new_empty(sum(recv_splits), self.hidden_size)
        dist.all_to_all_single(output, rows_RH.contiguous(), recv_splits, send_splits, group=self.mesh.replica)
        return output

    def _no_rows(self) -> Tensor:
        return torch.empty(0, self.hidden_size, dtype=self.dtype, device=current_device())


def _index(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(current_device())
