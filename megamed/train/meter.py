"""Speed of a run: FLOPs of a global batch, and the hardware's matrix-product peak that MFU is measured against."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megamed.data import Microbatch
from megamed.models.flops import flops_of_language, projector_flops, vision_flops
from megamed.models.vlm import VLMConfig
from megamed.runtime import Mesh, current_device, device_type, synchronize


def step_flops(model: VLMConfig, microbatches: Sequence[Microbatch]) -> int:
    """Model FLOPs of forward and backward over some microbatches; padding does not count.

    Args:
        model: the model.
        microbatches: packed rows.
    """
    total = 0
    for microbatch in microbatches:
        real_before = torch.cat([torch.zeros(1, dtype=torch.int64), (~microbatch.padding_S).cumsum(0)])
        lengths = [n for n in real_before[microbatch.cu_seqlens.long()].diff().tolist() if n]
        num_labels = int(microbatch.loss_kind_S.count_nonzero())
        total += flops_of_language(model.language, lengths, num_labels).total
    num_frames = sum(len(m.frames) for m in microbatches)
    total += vision_flops(model.vision, num_frames).total
    total += projector_flops(model.projector, num_frames, model.vision.image_size, model.vision.patch_size).total
    return total


def row_flops(model: VLMConfig, lengths: Sequence[int], num_frames: int) -> float:
    """What a row costs, for comparing rows: FLOPs as `step_flops` counts them, before its tokens are there.

    Args:
        model: the model.
        lengths: tokens of its documents.
        num_frames: frames of all of them.
    """
    seen = vision_flops(model.vision, num_frames).total
    seen += projector_flops(model.projector, num_frames, model.vision.image_size, model.vision.patch_size).total
    return float(seen + flops_of_language(model.language, lengths).total)


def sum_over_replicas(value: float, mesh: Mesh) -> float:
    """Sum of a number that all ranks of a replica share, over the replicas. Collective."""
    total = torch.tensor(value, dtype=torch.float64, device=current_device())
    dist.all_reduce(total, group=mesh.language.dp)
    return total.item()


def matmul_peak(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Best FLOP/s of a large matrix product on this rank's device, measured.

    On a CPU all ranks measure at once, since they share its cores; so should they compute.
    """
    size = 8192 if device_type() == "cuda" else 768
    a = torch.randn(size, size, dtype=dtype, device=current_device())
    b = torch.randn(size, size, dtype=dtype, device=current_device())
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize()
        best = max(best, 5 * 2 * size**3 / (time.perf_counter() - start))
    return best
