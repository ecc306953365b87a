"""Memory that a step takes beside what a rank holds: activations, frames, logits, buffers of collectives.

It is not estimated. A step of a rank is run, by the code that trains, on the meta device and with torch's fake process
group in the place of the other ranks; each operation says what it allocates, and storages say when they are freed. So
recomputation, ring attention, frames in flight, the schedule of the pipeline are in it as they are. What kernels take
for themselves while they run is not: torch does not say it.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamed.data import LOSS_KINDS, Frame, FrameRef, Microbatch
from megamed.parallel import PlacedModel, VisionPhase, place, run_schedule, trim_padding
from megamed.runtime import Mesh, build_mesh, current_device, destroy_mesh, meta_device, seed_everything
from megamed.train import JobConfig
from megamed.train.job import build_phase
from megamed.train.step import Stepper, loss_of


@dataclass
class Peak:
    """Bytes of a step beside what is held.

    Attributes:
        phases: most bytes at any time, in each phase of the step.
        left: bytes at its end.
    """

    phases: dict[str, int] = field(default_factory=dict)
    left: int = 0

    @property
    def most(self) -> int:
        """Of the whole step."""
        return max(self.phases.values())


# Collectives that write into tensors that are there, and that torch has no kernels of for the meta device.
_WITHOUT_META = {
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.allreduce_coalesced_.default,
}


def _pretend() -> Any:
    """The handle of a collective that is over."""
    return FakeWork().boxed()


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would pick attention that keeps all scores, which no other device does."""
    original = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Tensor:
        if not q.is_meta or others:
            return original(q, k, v, **others)
        fused: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        return fused

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from when they are made to when nothing has them.

    Args:
        device: type of the device whose storages count.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device, self.now, self.peak = device, 0, Peak()
        self._phase = ""
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account for a phase of the step."""
        before, self._phase = self._phase, name
        self._note()
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._see(tensor.untyped_storage(), was_there=True)
        pretended = func in _WITHOUT_META and self.device == "meta"
        result = _pretend() if pretended else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage, was_there: bool = False) -> None:
        """Count a storage, unless it is known; one that an operation is given before any has made it counts nothing."""
        key = storage._cdata
        known = self._sizes.get(key)
        if known is not None and known[0]() is storage:
            return
        size = 0 if was_there else storage.nbytes()
        self._sizes[key] = weakref.ref(storage, partial(self._forget, key)), size
        self.now += size
        self._note()

    def _forget(self, key: int, reference: Any) -> None:
        known = self._sizes.get(key)
        if known is not None and known[0] is reference:
            self.now -= known[1]
            del self._sizes[key]

    def _note(self) -> None:
        self.peak.phases[self._phase] = max(self.peak.phases.get(self._phase, 0), self.now)


def step_peak(
    model: PlacedModel,
    phase: VisionPhase,
    mesh: Mesh,
    microbatches: Sequence[Microbatch],
    load: Callable[[Sequence[Frame]], Tensor],
    text_loss_weight: float,
) -> Peak:
    """Run forward and backward of a step, and say what it took. On the meta device, or on any other.

    Args:
        model, phase, mesh: of this rank.
        microbatches: of this replica.
        load: frames of some references, [N, C, H, W].
        text_loss_weight: as in training.
    """
    Stepper(model, phase, mesh, text_loss_weight)  # has Megatron finish gradients as in training
    for part in model.parts:
        part.zero_grad_buffer()
    weights = torch.ones(len(LOSS_KINDS), device=current_device())
    with _fused_attention(), LiveBytes(current_device().type) as live:
        with live.phase("vision, forward"):
            rows = trim_padding(microbatches, mesh)
            encoded = phase.forward(rows, load)
            inputs = phase.language_inputs(rows, encoded)
            del encoded
        with live.phase("language"):
            run_schedule(model.language, inputs, partial(loss_of, weights=weights), with_labels=True, train=True)
            del inputs
        with live.phase("vision, backward"):
            phase.backward(scale=1.0)
            model.vision.finish_grad_sync()
        live.peak.left = live.now
    return live.peak


# Tokens of a filled row that are text at the least: a question and its answer.
_TEXT = 16


def filled_row(config: JobConfig, frame_tokens: int) -> Microbatch:
    """A row of one document without padding: as many whole frames as there is room for, then text with labels.

    Args:
        config: the job, for the length of its rows.
        frame_tokens: visual tokens of a frame.
    """
    length = config.data.seq_length
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
        frames=[FrameRef(0, num_frames, number) for number in range(num_frames)],
        sample_ids=["filled"],
        specialty_S=zeros,
    )


def peak_of_rank(config: JobConfig, rank: int, world_size: int, microbatches: Sequence[Microbatch]) -> Peak:
    """What a step of one rank of a job takes. This process must not be in a process group, and use no GPU.

    Args:
        config: the job, validated for this world size.
        rank: which.
        world_size: of the job.
        microbatches: of this rank's replica.
    """
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = build_mesh(config.parallel, config.ulysses, config.document_multiple)
        seed_everything(0, mesh.data_rank)
        dtype = config.train.torch_dtype
        vision = config.model.vision
        with meta_device():
            model = place(config.model, config.attention, mesh, dtype, None, config.optim.distributed)
            phase = build_phase(config, model, mesh)

            def load(frames: Sequence[Frame]) -> Tensor:
                size = (len(frames), vision.num_channels, vision.image_size, vision.image_size)
                return torch.empty(size, device="meta")

            return step_peak(model, phase, mesh, microbatches, load, config.train.text_loss_weight)
    finally:
        destroy_mesh()
        dist.destroy_process_group()
