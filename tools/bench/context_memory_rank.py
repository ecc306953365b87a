"""One rank of tools/bench/context_memory.py, which starts it: a training step on long rows, and its peak of memory.

Shapes: N frames, C channels, H and W pixels.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ring_blocks import document_bounds
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler._utils import traverse_dfs

from megamed import runtime
from megamed.config import compose, load
from megamed.data import Document, FrameRef, Microbatch, pack
from megamed.data.batch import ANSWER, NO_LOSS
from megamed.models.projector import tokens_per_frame
from megamed.train import JobConfig, build_job
from megamed.utils import log

CONF = Path(__file__).resolve().parents[2] / "conf"
# Of a document's tokens; the others are frames.
TEXT_SHARE = 1 / 8
# Of a rank in the step before the measured one, which makes the optimizer's state and whatever else is made once.
# The learning rate is still 0 then: its row may be another one at each context size.
WARMUP_TOKENS = 64
# Of the bytes of all tensors in the end, by how many what the profiler saw may differ from them.
MOST_MISSED = 0.001


class LongRows:
    """Packed rows of random text and frames, a function of their length alone.

    Args:
        config: the job, for the sizes of vocabulary and frames.
        num_documents: of a row, 1 : 2 : ... : M as long.
    """

    def __init__(self, config: JobConfig, num_documents: int):
        vision, ratio = config.model.vision, config.model.projector.downsample_ratio
        self.vocab_size, self.image_size = config.model.language.vocab_size, vision.image_size
        self.tokens_per_frame = tokens_per_frame(vision.image_size, vision.patch_size, ratio)
        self.num_documents = num_documents

    def microbatch(self, num_tokens: int) -> Microbatch:
        """A row without padding. A document has its frames first, then text, which carries the loss."""
        lengths = document_bounds(self.num_documents, num_tokens)
        generator = torch.Generator().manual_seed(num_tokens)
        documents = []
        for number, length in enumerate((lengths[1:] - lengths[:-1]).tolist()):
            num_frames = int(length * (1 - TEXT_SHARE)) // self.tokens_per_frame
            num_visual = num_frames * self.tokens_per_frame
            documents.append(Document(
                f"random-{number}",
                tokens=torch.randint(1, self.vocab_size, (length,), generator=generator).tolist(),
                loss_kinds=[NO_LOSS] * num_visual + [ANSWER] * (length - num_visual),
                visual_positions=list(range(num_visual)),
                frames=[FrameRef(number, num_frames, index) for index in range(num_frames)],
            ))  # fmt: skip
        return pack(documents, num_tokens, pad_id=0)

    def load_frames(self, frames: Sequence[FrameRef]) -> Tensor:
        """frames_NCHW: noise, a function of each reference."""
        frames_NCHW = torch.empty(len(frames), 3, self.image_size, self.image_size)
        for pixels_CHW, frame in zip(frames_NCHW, frames, strict=True):
            pixels_CHW.normal_(generator=torch.Generator().manual_seed(frame.first * 2**20 + frame.index))
        return frames_NCHW


@dataclass
class Memory:
    """Bytes of tensors on this rank's device: at most since the start, and at the end."""

    peak: int = 0
    kept: int = 0


@contextmanager
def watched() -> Iterator[Memory]:
    """Fills in its result when it ends; tensors from before do not count.

    On a GPU PyTorch counts by itself. On a CPU the profiler reports each allocation and each freeing of a tensor's
    memory, also within operators; what is left in the end has to be what the living tensors hold.

    Raises:
        RuntimeError: it is not.
    """
    memory = Memory()
    if runtime.device_type() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield memory
        memory.peak, memory.kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return
    before = living_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield memory
        gc.collect()
        living = {address: size for address, size in living_bytes().items() if address not in before}
    results: Any = profiler.profiler
    events = traverse_dfs(results.kineto_results.experimental_event_tree())
    fields = [(e.start_time_ns, e.extra_fields) for e in events if e.tag == _EventType.Allocation]
    changes = [(x.ptr, x.alloc_size) for _, x in sorted(fields, key=lambda field: field[0])]
    memory.peak, memory.kept = peak_and_kept(changes, set(living))
    if abs(memory.kept / sum(living.values()) - 1) > MOST_MISSED:
        raise RuntimeError(f"the profiler counts {memory.kept} bytes, and tensors hold {sum(living.values())}")


def peak_and_kept(changes: Sequence[tuple[int, int]], living: Set[int]) -> tuple[int, int]:
    """The largest and the last sum of a series of allocations, address and bytes, and freeings, minus their bytes.

    The profiler does not see what the threads of collectives free, once they are done with a buffer that nobody
    else holds: memory that is gone in the end, or is allocated once more, though it was never freed. It is not
    counted, since what it is mistaken by is no more than one buffer, for as long as it is being sent.

    Args:
        changes: in the order of time.
        living: addresses that are in use in the end.
    """
    counted = [0] * len(changes)
    opened: dict[int, int] = {}  # address to the number of its allocation
    for number, (address, size) in enumerate(changes):
        if size > 0:
            opened[address] = number
        elif address in opened:
            start = opened.pop(address)
            counted[start], counted[number] = changes[start][1], size
    for address, start in opened.items():
        if address in living:
            counted[start] = changes[start][1]
    peak = now = 0
    for change in counted:
        now += change
        peak = max(peak, now)
    return peak, now


def living_bytes() -> dict[int, int]:
    """Address and bytes of the memory of all tensors that there are."""
    tensors = (x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu")
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def job_config(args: argparse.Namespace) -> JobConfig:
    """The settings of the job."""
    overrides = [
        f"model={args.model}", f"data.seq_length={args.tokens}", f"model.language.max_positions={args.tokens}",
        "model.frames_in_flight=64", "train.microbatches=1",
        f"parallel.context={args.ring * args.ulysses}", f"attention.ring={args.ring}",
        f"attention.ulysses={args.ulysses}", *args.overrides,
    ]  # fmt: skip
    return load(JobConfig, compose(CONF, "pretrain", overrides))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train a step. Collective.

    Returns:
        On every rank, the step's numbers and the memory of each rank.
    """
    config = job_config(args)
    config.validate(runtime.world_size())
    mesh = runtime.build_mesh(config.parallel, config.ulysses)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    source = LongRows(config, args.documents)
    warmup, row = (source.microbatch(n) for n in (WARMUP_TOKENS * runtime.world_size(), args.tokens))
    with watched() as memory:
        job = build_job(config, mesh)
        job.stepper.train([warmup], source.load_frames, job.optimizer)
        start = time.perf_counter()
        report = job.stepper.train([row], source.load_frames, job.optimizer)
        seconds = time.perf_counter() - start
    device = f"one thread of a {platform.machine()} CPU a rank"
    if runtime.device_type() == "cuda":
        device = f"one {torch.cuda.get_device_name()} a rank"
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (memory.peak, memory.kept))
    return {
        "ring": args.ring,
        "ulysses": args.ulysses,
        "device": device,
        "dtype": str(job.dtype),
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "frames": report.num_frames,
        "seconds": seconds,
        "peak": [peak for peak, _ in every],
        "kept": [kept for _, kept in every],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--model", required=True)
    for name in ("tokens", "documents", "ring", "ulysses"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where rank 0 writes what was measured, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    log.setup(runtime.global_rank(), level="WARNING")
    runtime.start()
    measured = measure(args)
    if runtime.global_rank() == 0:
        args.out.write_text(json.dumps(measured))


if __name__ == "__main__":
    runtime.run(main)
