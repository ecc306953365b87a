"""A step of one rank of a job, run without memory: what it takes, and what it does.

Nothing is estimated. The step is run, by the code that trains, on the meta device and with torch's fake process group
in the place of the other ranks. So recomputation, ring attention, frames in flight, the schedule of the pipeline are
in it as they are. Two things are not: what is one kernel on a GPU stands as one operation (`kernels.py`), and tokens
are spread evenly over experts, since nothing tells a router.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor, nn

from megamed.data import LOSS_KINDS, Frame, Microbatch
from megamed.models.moe import Router
from megamed.models.moe.router import in_turns
from megamed.optim import clip_by_total_norm
from megamed.parallel import PlacedModel, VisionPhase, run_schedule, trim_padding
from megamed.preflight.held import Held, built_rank, held_by
from megamed.preflight.kernels import fused_attention, gpu_kernels
from megamed.preflight.trace import Peak, Trace
from megamed.preflight.work import Work
from megamed.runtime import Mesh, current_device
from megamed.train import JobConfig
from megamed.train.job import build_phase
from megamed.train.step import loss_of

VISION_FORWARD, LANGUAGE, VISION_BACKWARD = "vision, forward", "language", "vision, backward"
GRADIENTS, OPTIMIZER = "gradients", "optimizer"
# What memory of the step is for.
FRAMES, VISUAL_TOKENS, LAYERS, LOGITS, BUFFERS = (
    "frames' activations", "visual tokens", "layers' activations", "logits and loss", "gradients and buffers"
)  # fmt: skip
PARTS = FRAMES, VISUAL_TOKENS, LAYERS, LOGITS, BUFFERS
PHASES = VISION_FORWARD, LANGUAGE, VISION_BACKWARD, GRADIENTS, OPTIMIZER


@dataclass(frozen=True)
class Rank:
    """What one rank of a job holds, takes and does.

    Attributes:
        held: from the first step to the last.
        peak: beside it, in a step.
        work: of a step, by phase.
        groups: global ranks of the group of each axis that something is sent over.
    """

    held: Held
    peak: Peak
    work: dict[str, Work]
    groups: dict[str, list[int]]

    @property
    def memory(self) -> int:
        """Most bytes at any time."""
        return self.held.total + self.peak.most


class Axes:
    """Names of the process groups of a mesh, as they stand in tables."""

    def __init__(self, mesh: Mesh):
        language = mesh.language
        named = {
            "tied embeddings": getattr(language, "embd", None),
            "tensor x context": getattr(language, "tp_cp", None),
            "expert x tensor": getattr(language, "tp_ep", None),
            "expert tensor": getattr(language, "expt_tp", None),
            "gradients of experts": getattr(language, "expt_dp", None),
            "expert": language.ep,
            "gradients": language.dp_cp,
            "gradients of the encoder": mesh.vision.dp,
            "frames": mesh.replica,
            "context": language.cp,
            "ring": mesh.ring,
            "Ulysses": mesh.ulysses,
            "pipeline": language.pp,
            "tensor": language.tp,
        }
        # Groups of the same ranks can be one: the last name holds.
        self._names = {group.group_name: name for name, group in named.items() if group is not None}
        self._pipeline = language.pp
        self.groups: dict[str, list[int]] = {}

    def name(self, group: dist.ProcessGroup, operation: str) -> str:
        """Of the axis of a transfer, whose ranks are kept."""
        name = self._names.get(group.group_name, "others")
        # Between two stages Megatron sends one of the directions over the group of all ranks.
        if operation == "send" and name == "gradients of the encoder":
            group, name = self._pipeline, "pipeline"
        self.groups.setdefault(name, dist.get_process_group_ranks(group))
        return name


@contextmanager
def _even_routing(trace: Trace) -> Iterator[None]:
    """Each expert gets as many tokens as the others. The choice is made on the host, where its sums can be read."""
    route, gather = Router.forward, token_dispatcher.gather_from_sequence_parallel_region

    def forward(self: Router, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probs_TE, picked_TE = route(self, input, padding_mask)
        num_tokens, num_experts = picked_TE.shape
        chosen_TK = in_turns(torch.arange(num_experts, device="cpu"), num_tokens, self.moe.top_k)
        even_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device="cpu").scatter_(1, chosen_TK, True)
        trace.count(even_TE)
        return probs_TE, even_TE

    def gather_choices(input_: Tensor, *args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Tensor:
        """Choices and their counts are the same on all ranks."""
        if input_.is_floating_point():
            return gather(input_, *args, group=group, **kwargs)
        return torch.cat([input_] * group.size())

    with (
        mock.patch.object(Router, "forward", forward),
        mock.patch.object(token_dispatcher, "gather_from_sequence_parallel_region", gather_choices),
    ):
        yield


def _parts(model: PlacedModel) -> dict[str, list[nn.Module]]:
    """Modules, by what the memory is for that they take in their forward pass; layers are also called one by one."""
    encoder = model.vision.module
    chunks = [chunk.module for chunk in model.language]
    blocks = [block for chunk in chunks for block in (chunk.decoder, *chunk.decoder.layers)]
    embeddings = [chunk.embedding for chunk in chunks if chunk.pre_process]
    return {
        FRAMES: [encoder, *encoder.vision_tower.layers],
        LOGITS: list(chunks),
        LAYERS: [*blocks, *embeddings],
    }


def _add_counts(optimizer: ChainedOptimizer) -> None:
    """Give torch's Adam the number of steps of each parameter, which Megatron leaves out of a state that it makes."""
    for part in optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            state.setdefault("step", torch.zeros((), device=parameter.device))


def trace_step(
    model: PlacedModel,
    phase: VisionPhase,
    optimizer: ChainedOptimizer,
    mesh: Mesh,
    microbatches: Sequence[Microbatch],
    load: Callable[[Sequence[Frame]], Tensor],
    num_language: int | None = None,
) -> tuple[Peak, dict[str, Work], dict[str, list[int]]]:
    """Run a step, and say what it took. On the meta device, or on any other.

    Args:
        model, phase, optimizer, mesh: of this rank.
        microbatches: of this replica.
        load: frames of some references, [N, C, H, W].
        num_language: microbatches that the language model is run with, the first ones; None for all. The visual
            tokens of the others have gradients all the same.

    Returns:
        Memory; work by phase; ranks of the groups.
    """
    for part in model.parts:
        part.zero_grad_buffer()
    weights = torch.ones(len(LOSS_KINDS), device=current_device())
    axes = Axes(mesh)
    trace = Trace(current_device().type, axes.name)

    def finish_gradients(*args: Any, **kwargs: Any) -> None:
        with trace.phase(GRADIENTS, BUFFERS):
            finalize_model_grads(*args, **kwargs)

    for chunk in model.language:
        chunk.config.finalize_model_grads_func = finish_gradients
    with trace, trace.parts(_parts(model)), fused_attention(), _even_routing(trace):
        with trace.phase(VISION_FORWARD, VISUAL_TOKENS):
            rows = trim_padding(microbatches, mesh)
            encoded = phase.forward(rows, load)
            inputs = phase.language_inputs(rows, encoded)
        with trace.phase(LANGUAGE, BUFFERS):
            for row in encoded[num_language:] if num_language else ():
                row.grad = torch.zeros_like(row)
            del encoded
            some = inputs[:num_language]
            run_schedule(model.language, some, partial(loss_of, weights=weights), with_labels=True, train=True)
            del inputs, some
        with trace.phase(VISION_BACKWARD, BUFFERS):
            phase.backward(scale=1.0)
        with trace.phase(GRADIENTS, BUFFERS):
            model.vision.finish_grad_sync()
        with trace.phase(OPTIMIZER, BUFFERS):
            _add_counts(optimizer)
            optimizer.prepare_grads()
            clip_by_total_norm(optimizer, 1.0)  # the norm itself would be read, and nothing is there
            optimizer.step_with_ready_grads()
        trace.peak.left = trace.now.total()
    return trace.peak, trace.work, axes.groups


# Tokens of a filled row that are text at the least: a question and its answer.
_TEXT = 16


def filled_row(config: JobConfig) -> Microbatch:
    """A row of one document without padding: as many whole frames as there is room for, then text with labels.

    Args:
        config: the job, for the length of its rows.
    """
    length, frame_tokens = config.data.seq_length, config.model.tokens_per_frame
    num_frames = max(length - _TEXT, 0) // frame_tokens
    visual = torch.arange(num_frames * frame_tokens)
    kinds = torch.zeros(length, dtype=torch.uint8)
    kinds[len(visual) : length - 1] = LOSS_KINDS.index("answer")
    zeros = torch.zeros(length, dtype=torch.int64)
    return Microbatch(
        tokens_S=zeros,
        labels_S=zeros,
        loss_kind_S=kinds,
        position_S=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        num_real=length,
        padding_S=torch.zeros(length, dtype=torch.bool),
        visual_positions=visual,
        frames=list(range(num_frames)),
        sample_ids=["filled"],
        specialty_S=zeros,
    )


def trace_rank(
    config: JobConfig,
    rank: int,
    world_size: int,
    microbatches: Sequence[Microbatch],
    num_language: int | None = None,
    as_gpu: bool = True,
) -> Rank:
    """Build one rank of a job, and run a step of it. This process must not be in a process group, and use no GPU.

    Args:
        config: the job, validated for this world size.
        rank: which.
        world_size: of the job.
        microbatches: of this rank's replica.
        num_language: microbatches that the language model is run with; None for all.
        as_gpu: count RMSNorm and SwiGLU as the kernels that they are on a GPU; else as the operations of a CPU.
    """
    vision = config.model.vision
    with built_rank(config, rank, world_size) as built:
        held = held_by(built.model, built.optimizer)
        phase = build_phase(config, built.model, built.mesh)

        def load(frames: Sequence[Frame]) -> Tensor:
            size = (len(frames), vision.num_channels, vision.image_size, vision.image_size)
            return torch.empty(size, device="meta")

        parts = built.model, phase, built.optimizer, built.mesh
        with gpu_kernels(built.model.language) if as_gpu else nullcontext():
            return Rank(held, *trace_step(*parts, microbatches, load, num_language))
