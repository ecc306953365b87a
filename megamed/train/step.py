"""One training step: vision phase, language phase, vision backward, optimizer.

The loss is the weighted sum over all labelled tokens of the global batch, divided by their weight: a sample's
share does not depend on which microbatch, replica or rank it fell to. The weight is known before the
step, from the token layouts, so the gradients need no correction afterwards, and Megatron's auxiliary
MoE losses, which are averaged over microbatches, keep one scale at every layout.

Shapes: S tokens of a packed row, B = 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megamed.data import LOSS_KINDS, Frame, Microbatch
from megamed.models.moe import RoutingCounts, StepStatistics, move_biases, take_statistics
from megamed.optim import clip_by_total_norm
from megamed.parallel import LanguageInput, PlacedModel, VisionPhase, run_schedule, trim_padding
from megamed.runtime import Mesh, current_device

LoadFrames = Callable[[Sequence[Frame]], Tensor]


@dataclass(frozen=True)
class StepReport:
    """What one step measured, the same on every rank."""

    loss: float
    """Weighted mean over the labelled tokens, nats."""
    loss_by_kind: dict[str, float]
    """Mean for each kind of labelled token."""
    grad_norm: float | None
    """Norm of the whole model's gradient before clipping; None before an optimizer has looked at it."""
    num_tokens: int
    """Tokens of the global batch, without padding."""
    num_labels: int
    num_frames: int
    """Frames of the global batch."""
    num_encoded: int
    """Frames encoded, summed over all ranks: num_frames if nobody does work twice."""
    moe_losses: dict[str, float]
    """Mean over layers and microbatches of each auxiliary loss, before its coefficient."""
    routing: RoutingCounts | None
    """Which experts the tokens of the global batch were sent to; None for a dense model."""


Judge = Callable[[float, float], str | None]


class BadStep(FloatingPointError):
    """A step whose gradient was not applied.

    Attributes:
        what: is wrong with it.
        report: of the step.
    """

    def __init__(self, what: str, report: StepReport):
        super().__init__(f"the gradient norm is {report.grad_norm} at loss {report.loss}")
        self.what, self.report = what, report


class Stepper:
    """Runs training steps of a placed model.

    Args:
        model: this rank's parts.
        phase: the vision phase over the same encoder.
        mesh: the layout.
        text_loss_weight: weight of the loss on labelled tokens that are no answers, whose own weight is 1.
    """

    def __init__(self, model: PlacedModel, phase: VisionPhase, mesh: Mesh, text_loss_weight: float = 1.0):
        self.model = model
        self.phase = phase
        self.mesh = mesh
        self.weights = {"none": 0.0, "text": text_loss_weight, "answer": 1.0}
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
        report = self._phases(microbatches, load)
        # What Megatron's DDP divides the language model's gradients by, after the backward pass.
        self.phase.backward(scale=1.0 / (self.mesh.data_size * self.mesh.config.context))
        self.model.vision.finish_grad_sync()
        return report

    def train(
        self,
        microbatches: Sequence[Microbatch],
        load: LoadFrames,
        optimizer: ChainedOptimizer,
        judge: Judge | None = None,
    ) -> StepReport:
        """One optimizer step.

        Args:
            microbatches, load: as for `gradients`.
            optimizer: applies the gradient.
            judge: says what is wrong with a step, by its loss and gradient norm; by default, a norm that is no number.

        Returns:
            The report, with the gradient norm.

        Raises:
            BadStep: something is; weights and optimizer are as they were.
        """
        optimizer.zero_grad()
        report = self.gradients(microbatches, load)
        # Megatron's own `step`, opened up: it would apply a gradient that is not finite.
        optimizer.prepare_grads()
        norm = optimizer.get_grad_norm()
        if what := (judge or _is_finite)(report.loss, norm):
            raise BadStep(what, replace(report, grad_norm=norm))
        clip_by_total_norm(optimizer, norm)
        optimizer.step_with_ready_grads()
        if report.routing is not None:
            move_biases(self.model.language, self.model.language[0].config.moe_layer_freq, report.routing)
        return replace(report, grad_norm=norm)

    def _phases(self, microbatches: Sequence[Microbatch], load: LoadFrames) -> StepReport:
        microbatches = trim_padding(microbatches, self.mesh)
        rows = self.phase.forward(microbatches, load)
        counts = self._counts(microbatches)
        inputs = self.phase.language_inputs(microbatches, rows)
        # Megatron divides by the number of microbatches and by the data-parallel size; see the module's text.
        labels = counts.pop("labels")
        total_weight = sum(self.weights[kind] * count for kind, count in zip(LOSS_KINDS, labels, strict=True))
        scale = len(inputs) * self.mesh.data_size / (total_weight or 1.0)
        weights = torch.tensor([self.weights[kind] for kind in LOSS_KINDS], device=current_device())
        finish = partial(loss_of, weights=weights * scale)
        parts = run_schedule(self.model.language, inputs, finish, with_labels=True, train=True)
        sums = self._sum_over_replicas(parts)
        return self._report(sums, labels, counts, self._statistics(len(inputs)))

    def _counts(self, microbatches: Sequence[Microbatch]) -> dict[str, Any]:
        """Sizes of the global batch. Every replica counts its own; one rank of each speaks for it."""
        speaks = int(self.phase.rank == 0)
        labels = sum(torch.bincount(m.loss_kind_S, minlength=len(LOSS_KINDS)) for m in microbatches)
        assert isinstance(labels, Tensor)
        mine = [sum(m.num_real for m in microbatches), sum(len(m.frames) for m in microbatches), *labels.tolist()]
        total = torch.tensor([self.phase.num_encoded, *(speaks * count for count in mine)], device=current_device())
        dist.all_reduce(total)
        num_encoded, num_tokens, num_frames, *by_kind = total.tolist()
        by_kind[0] = 0  # "none" is no label
        return {"num_tokens": num_tokens, "num_frames": num_frames, "num_encoded": num_encoded, "labels": by_kind}

    def _sum_over_replicas(self, parts: list[Tensor]) -> Tensor:
        """Loss sums by kind over the global batch, on every rank."""
        total = torch.zeros(len(LOSS_KINDS), dtype=torch.float64, device=current_device())
        if self.mesh.is_last_stage and self.mesh.language.tp.rank() == 0:
            total += torch.stack(parts).sum(0)
        dist.all_reduce(total)
        return total

    def _statistics(self, num_microbatches: int) -> StepStatistics | None:
        """What the routers of all ranks counted; None for a dense model."""
        chunks = self.model.language
        if not chunks[0].config.num_moe_experts:
            return None
        total = num_microbatches * self.mesh.data_size
        return take_statistics(chunks, chunks[0].module.moe, chunks[0].config.moe_layer_freq, total)

    def _report(
        self, sums: Tensor, labels: list[int], counts: dict[str, int], statistics: StepStatistics | None
    ) -> StepReport:
        kinds = [k for k in zip(LOSS_KINDS, sums.tolist(), labels, strict=True) if k[2]]
        total_weight = sum(self.weights[name] * count for name, _, count in kinds)
        return StepReport(
            loss=sum(self.weights[name] * total for name, total, _ in kinds) / (total_weight or 1.0),
            loss_by_kind={name: total / count for name, total, count in kinds},
            grad_norm=None,
            num_labels=sum(labels),
            moe_losses=statistics.losses if statistics else {},
            routing=statistics.counts if statistics else None,
            **counts,
        )


def _is_finite(loss: float, norm: float) -> str | None:
    return None if math.isfinite(norm) else "not_finite"


def loss_of(output: Tensor, item: LanguageInput, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A microbatch's weighted loss, and the sums of losses [kinds] by kind of label."""
    losses = output.float().flatten()
    kinds = item.loss_kind_BS.flatten()
    sums = torch.zeros(len(weights), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, kinds, losses.detach().double())
    return (losses * weights[kinds]).sum(), sums
