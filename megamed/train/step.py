"""One training step: vision phase, language phase, vision backward, optimizer.

The loss is the sum over all labelled tokens of the global batch, divided by their number: a sample's
weight does not depend on which microbatch, replica or rank it fell to. The number is known before the
step, from the token layouts, so the gradients need no correction afterwards, and Megatron's auxiliary
MoE losses, which are averaged over microbatches, keep one scale at every layout.

Shapes: S tokens of a packed row, B = 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megamed.data import LOSS_KINDS, FrameRef, Microbatch
from megamed.models.moe import AUX_LOSSES, take_recorded_losses
from megamed.optim import clip_by_total_norm
from megamed.parallel import LanguageInput, PlacedModel, VisionPhase, run_schedule
from megamed.runtime import Mesh, current_device

LoadFrames = Callable[[Sequence[FrameRef]], Tensor]


@dataclass(frozen=True)
class StepReport:
    """What one step measured, the same on every rank."""

    loss: float
    """Mean loss per labelled token, nats."""
    loss_by_kind: dict[str, float]
    """The same for each kind of labelled token."""
    grad_norm: float | None
    """Norm of the whole model's gradient before clipping; None in evaluation."""
    num_tokens: int
    """Tokens of the global batch, without padding."""
    num_labels: int
    num_frames: int
    """Frames of the global batch."""
    num_encoded: int
    """Frames encoded, summed over all ranks: num_frames if nobody does work twice."""
    moe_losses: dict[str, float]
    """Mean over layers and microbatches of each auxiliary loss, before its coefficient."""


class Stepper:
    """Runs training and evaluation steps of a placed model.

    Args:
        model: this rank's parts.
        phase: the vision phase over the same encoder.
        mesh: the layout.
    """

    def __init__(self, model: PlacedModel, phase: VisionPhase, mesh: Mesh):
        self.model = model
        self.phase = phase
        self.mesh = mesh
        for chunk in model.language:
            chunk.config.finalize_model_grads_func = finalize_model_grads

    def gradients(self, microbatches: Sequence[Microbatch], load: LoadFrames) -> StepReport:
        """Forward and backward; leaves every parameter's reduced gradient in `main_grad`.

        Args:
            microbatches: this replica's share of the global batch; as many on every replica.
            load: frames of some references, [N, C, H, W].
        """
        for part in self.model.parts:
            part.zero_grad_buffer()
        report = self._phases(microbatches, load, train=True)
        self.phase.backward(scale=1.0 / self.mesh.data_size)
        self.model.vision.finish_grad_sync()
        return report

    def train(self, microbatches: Sequence[Microbatch], load: LoadFrames, optimizer: ChainedOptimizer) -> StepReport:
        """One optimizer step. Arguments as in `gradients`; returns the report with the gradient norm.

        Raises:
            FloatingPointError: the gradient norm is not finite; the weights are unchanged.
        """
        optimizer.zero_grad()
        report = self.gradients(microbatches, load)
        # Megatron's own `step`, opened up: it would apply a gradient that is not finite.
        optimizer.prepare_grads()
        norm = optimizer.get_grad_norm()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm} at loss {report.loss}")
        clip_by_total_norm(optimizer, norm)
        optimizer.step_with_ready_grads()
        return replace(report, grad_norm=norm)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], load: LoadFrames) -> StepReport:
        """The loss alone. Arguments as in `gradients`."""
        for part in self.model.parts:
            part.eval()
        report = self._phases(microbatches, load, train=False)
        for part in self.model.parts:
            part.train()
        return report

    def _phases(self, microbatches: Sequence[Microbatch], load: LoadFrames, train: bool) -> StepReport:
        rows = self.phase.forward(microbatches, load, keep_graph=train)
        counts = self._counts(microbatches)
        inputs = self.phase.language_inputs(microbatches, rows)
        # Megatron divides by the number of microbatches and by the data-parallel size; see the module's text.
        scale = len(inputs) * self.mesh.data_size / max(counts["num_labels"], 1)
        parts = run_schedule(self.model.language, inputs, partial(_loss, scale=scale), with_labels=True, train=train)
        sums = self._sum_over_replicas(parts)
        return _report(sums, counts, self._moe_losses(len(inputs)) if train else {})

    def _counts(self, microbatches: Sequence[Microbatch]) -> dict[str, int]:
        """Sizes of the global batch. Every replica counts its own; one rank of each speaks for it."""
        speaks = int(self.phase.rank == 0)
        values = {
            "num_labels": speaks * sum(int((m.loss_kind_S > 0).sum()) for m in microbatches),
            "num_tokens": speaks * sum(m.num_real for m in microbatches),
            "num_frames": speaks * sum(len(m.frames) for m in microbatches),
            "num_encoded": self.phase.num_encoded,
        }
        total = torch.tensor(list(values.values()), device=current_device())
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def _sum_over_replicas(self, parts: list[Tensor]) -> Tensor:
        """Loss sums and counts by kind [2, kinds] over the global batch, on every rank."""
        total = torch.zeros(2, len(LOSS_KINDS), dtype=torch.float64, device=current_device())
        if self.mesh.is_last_stage and self.mesh.language.tp.rank() == 0:
            total += torch.stack(parts).sum(0)
        dist.all_reduce(total)
        return total

    def _moe_losses(self, num_microbatches: int) -> dict[str, float]:
        """Means over layers and microbatches of the global batch, on every rank."""
        config = self.model.language[0].config
        if not config.num_moe_experts:
            return {}
        recorded = take_recorded_losses()
        zero = torch.zeros((), dtype=torch.float64, device=current_device())
        total = torch.stack([recorded.get(name, zero) for name in AUX_LOSSES])
        dist.all_reduce(total)
        total /= sum(config.moe_layer_freq) * num_microbatches * self.mesh.data_size
        return {name: value for name, value in zip(AUX_LOSSES, total.tolist(), strict=True) if value}


def _report(sums: Tensor, counts: dict[str, int], moe_losses: dict[str, float]) -> StepReport:
    totals, numbers = sums.tolist()
    by_kind = {
        kind: total / number
        for kind, total, number in zip(LOSS_KINDS[1:], totals[1:], numbers[1:], strict=True)
        if number
    }
    loss = sum(totals[1:]) / max(counts["num_labels"], 1)
    return StepReport(loss=loss, loss_by_kind=by_kind, grad_norm=None, moe_losses=moe_losses, **counts)


def _loss(output: Tensor, item: LanguageInput, scale: float) -> tuple[Tensor, Tensor]:
    losses = output.float().flatten()
    kinds = item.loss_kind_BS.flatten()
    sums = torch.zeros(2, len(LOSS_KINDS), dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, kinds, losses.detach().double())
    sums[1].index_add_(0, kinds, torch.ones_like(losses, dtype=torch.float64))
    return (losses * (kinds > 0)).sum() * scale, sums
