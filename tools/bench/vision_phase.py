"""Time a training step with each frame encoded once in a model replica, beside every rank encoding every frame.

    python tools/bench/vision_phase.py                                      three layouts, one after another
    python tools/bench/vision_phase.py --layouts TP4xPP2 --model internvl26b --frames 28 --seq-length 8192

A layout is a product of TP (tensor), CP (context), PP (pipeline) and DP (replicas); torchrun is started for each,
with as many processes as it has ranks, on GPUs where there are any. Within a run the sides take their steps
turn by turn on one model, and must agree on the loss and on the norm of the gradient before they are timed:

  dealt                the frames of a step are dealt out over all ranks of the replica: what megamed does
  dealt, n in flight   the same, with activations of n frames a rank at a time; the others are encoded twice
  first stage          each rank of the first pipeline stage encodes all frames (where there are several stages)
  every rank           each rank of the replica encodes all frames

Shapes: R rows (visual tokens), H language hidden size.
"""

import argparse
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megamed.data import FrameRef, Microbatch
    from megamed.parallel import LanguageInput, VisionPhase
    from megamed.runtime import Mesh
    from megamed.train import Job

CONF = Path(__file__).resolve().parents[2] / "conf"
LAYOUTS = "TP2,TP2xCP2,TP2xCP2xPP2"
SIZES = {"TP": "tensor", "CP": "context", "PP": "pipeline", "DP": "data"}
# The tiny model with more patches and vision layers: the encoder's share of the FLOPs is then that of InternVL-26B.
TINY = ("model.vision.image_size=112", "model.vision.num_layers=6")
NUM_PIXEL_SETS = 16


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for launch/pretrain.py")
    parser.add_argument("--layouts", default=LAYOUTS, help=f"separated by commas (default: {LAYOUTS})")
    parser.add_argument("--model", default="internvl_tiny", help="a name in conf/model (default: internvl_tiny)")
    parser.add_argument("--frames", type=int, default=32, help="frames of a document (default: 32)")
    parser.add_argument("--seq-length", type=int, default=768, help="tokens of a packed row (default: 768)")
    parser.add_argument("--microbatches", type=int, default=2, help="packed rows of a step (default: 2)")
    parser.add_argument("--frames-in-flight", type=int, default=4, metavar="N",
                        help="frames in flight of the side that bounds them (default: 4)")
    parser.add_argument("--repetitions", type=int, default=10, help="timed steps of each side (default: 10)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process (default: 1)")
    return parser.parse_args()


def parallel_sizes(layout: str) -> dict[str, int]:
    """`TP2xPP2` as the fields of the parallel configuration.

    Raises:
        UserError: it cannot be read.
    """
    from megamed.utils import UserError

    found = [re.fullmatch(r"(TP|CP|PP|DP)(\d+)", part) for part in layout.split("x")]
    sizes = {SIZES[match[1]]: int(match[2]) for match in found if match}
    if len(sizes) < len(found):
        raise UserError(f"--layouts: {layout!r} cannot be read; write it like TP2xCP2xPP2", everywhere=True)
    return sizes


def start_ranks(args: argparse.Namespace) -> int:
    """Run this file under torchrun for each layout; the exit code of the first that failed."""
    layouts = [(layout, math.prod(parallel_sizes(layout).values())) for layout in args.layouts.split(",")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore"}
    for layout, num_ranks in layouts:
        say(f"{layout}: starting {num_ranks} processes")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", str(num_ranks), __file__, *sys.argv[1:], "--layouts", layout]
        if code := subprocess.run(command, env=environment).returncode:
            return code
    return 0


def say(text: str) -> None:
    if not int(os.environ.get("RANK", "0")):
        print(text, file=sys.stderr, flush=True)


class EveryRankEncodes:
    """Stands in for a `VisionPhase`: ranks encode all frames of the replica and keep the rows that they embed.

    Args:
        phase: the phase that it stands in for; encodes and runs back.
        mesh: the layout.
        first_stage_only: ranks of later pipeline stages encode nothing.
    """

    def __init__(self, phase: "VisionPhase", mesh: "Mesh", first_stage_only: bool):
        self.phase, self.mesh, self.rank = phase, mesh, phase.rank
        self.encodes = mesh.is_first_stage or not first_stage_only
        self.num_encoded = self._num_rows = 0
        self._rows: list[Tensor] = []
        self._index: list[Tensor] = []

    def forward(
        self, microbatches: "Sequence[Microbatch]", load: "Callable[[Sequence[FrameRef]], Tensor]"
    ) -> "list[Tensor]":
        """As `VisionPhase.forward`."""
        frames = [f for m in microbatches for f in m.frames] if self.encodes else []
        self.num_encoded = len(frames)
        encoded_RH = self.phase.passes.forward(frames, load)
        self._index = self._rows_here(microbatches, encoded_RH.device)
        self._num_rows = len(encoded_RH)
        self._rows = [encoded_RH[index].requires_grad_() for index in self._index]
        return self._rows

    def backward(self, scale: float) -> None:
        """As `VisionPhase.backward`; ranks that embed the same rows each bring their share of the gradient."""
        from megamed.parallel.sequence import splits_sequence

        holders = 1 if splits_sequence(self.mesh) else self.mesh.config.tensor
        grad_RH = self._rows[0].new_zeros(self._num_rows, self.phase.hidden_size)
        for index, row in zip(self._index, self._rows, strict=True):
            if row.grad is not None:
                grad_RH[index] = row.grad * (scale / holders)
        self._rows = []
        self.phase.passes.backward(grad_RH)

    def language_inputs(
        self, microbatches: "Sequence[Microbatch]", rows: "Sequence[Tensor]"
    ) -> "list[LanguageInput]":
        """As `VisionPhase.language_inputs`."""
        return self.phase.language_inputs(microbatches, rows)

    def _rows_here(self, microbatches: "Sequence[Microbatch]", device: Any) -> "list[Tensor]":
        """For each microbatch, which of the encoded rows have their place in this rank's part of the sequence."""
        import numpy as np
        import torch

        from megamed.parallel.sequence import row_order, sequence_shards

        found, start = [], 0
        for microbatch in microbatches:
            shard = sequence_shards(self.mesh, len(microbatch.tokens_S))[self.rank]
            place = row_order(microbatch, self.mesh).place_S[microbatch.visual_positions.numpy()]
            here = np.flatnonzero((place >= shard.start) & (place < shard.end))
            found.append(torch.from_numpy(start + here).to(device))
            start += len(place)
        return found


@dataclass
class Side:
    """One way of encoding, and what was measured of it."""

    name: str
    train: Callable[[], Any]
    gradients: Callable[[], Any]
    loss: float = 0.0
    grad_norm: float = 0.0
    num_encoded: int = 0
    """Frames that went through an encoder in one step, over all ranks."""
    flops: float = 0.0
    wall: list[float] = field(default_factory=list)
    """Seconds of each step."""
    cpu: list[float] = field(default_factory=list)
    """Processor seconds of each step, over all ranks: what it costs, whatever else the machine does meanwhile."""


def build(args: argparse.Namespace, layout: str) -> "tuple[Job, list[Microbatch], list[Side]]":
    """The model, this replica's rows, and the sides."""
    import torch
    import torch.distributed as dist
    from slices import rows

    from megamed import runtime, train
    from megamed.config import compose, load
    from megamed.parallel import VisionPhase

    overrides = [f"model={args.model}", *(TINY if args.model == "internvl_tiny" else ()),
                 *(f"parallel.{name}={size}" for name, size in parallel_sizes(layout).items()),
                 f"train.microbatches={args.microbatches}", f"data.seq_length={args.seq_length}",
                 "optim.warmup_steps=0", "model.frames_in_flight=null", *args.overrides]
    config = load(train.JobConfig, compose(CONF, "pretrain", overrides))
    config.validate(dist.get_world_size())
    mesh = runtime.build_mesh(config.parallel, config.ulysses)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    job = train.build_job(config, mesh)
    microbatches = rows(config, job.phase.tokens_per_frame, args.frames)[mesh.data_rank :: mesh.data_size]
    size = config.model.vision.image_size
    pixels = torch.randn(NUM_PIXEL_SETS, 3, size, size, generator=torch.Generator().manual_seed(1))

    def load_frames(refs: "Sequence[FrameRef]") -> torch.Tensor:
        return pixels[[(ref.first + ref.index) % NUM_PIXEL_SETS for ref in refs]]

    bounded = VisionPhase(job.model.vision, mesh, job.phase.tokens_per_frame, job.phase.hidden_size, job.dtype,
                          config.model.frames_per_pass, args.frames_in_flight)
    phases: dict[str, Any] = {"dealt": job.phase, f"dealt, {args.frames_in_flight} in flight": bounded}
    if config.parallel.pipeline > 1:
        phases["first stage"] = EveryRankEncodes(job.phase, mesh, first_stage_only=True)
    phases["every rank"] = EveryRankEncodes(job.phase, mesh, first_stage_only=False)
    sides = []
    for name, phase in phases.items():
        stepper = train.Stepper(job.model, phase, mesh)
        sides.append(Side(
            name,
            train=partial(stepper.train, microbatches, load_frames, job.optimizer),
            gradients=partial(stepper.gradients, microbatches, load_frames),
        ))
    return job, microbatches, sides


def over_ranks(value: float) -> float:
    """Sum over all ranks. Collective."""
    import torch
    import torch.distributed as dist

    from megamed.runtime import current_device

    total = torch.tensor(value, dtype=torch.float64, device=current_device())
    dist.all_reduce(total)
    return total.item()


def compare(job: "Job", microbatches: "Sequence[Microbatch]", sides: Sequence[Side]) -> float:
    """Loss, gradient norm, encoded frames and FLOPs of each side, on the same weights.

    Returns:
        The encoder's share of the model FLOPs.

    Raises:
        RuntimeError: the sides do not compute the same.
    """
    import torch

    from megamed.models.flops import projector_flops, vision_flops
    from megamed.train.meter import step_flops, sum_over_replicas

    model, seen = job.config.model, 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal seen
        seen += len(inputs[0])

    vision = model.vision
    frame = vision_flops(vision, 1) + projector_flops(model.projector, 1, vision.image_size, vision.patch_size)
    whole = sum_over_replicas(step_flops(model, microbatches), job.mesh)
    language = whole - frame.total * sum_over_replicas(sum(len(m.frames) for m in microbatches), job.mesh)
    hook = job.model.vision.module.register_forward_pre_hook(count)
    for side in sides:
        seen = 0
        job.optimizer.zero_grad()
        report = side.gradients()
        job.optimizer.prepare_grads()
        side.loss, side.grad_norm = report.loss, job.optimizer.get_grad_norm()
        side.num_encoded = int(over_ranks(seen))
        # Each rank runs its frames back once, however often it encoded them.
        side.flops = language + side.num_encoded * frame.forward + report.num_encoded * frame.backward
        # The same function: what is left is rounding, of fp32 or of bf16 (8 bits).
        tolerance = 1e-5 if job.dtype == torch.float32 else 1e-2
        for found, expected in ((side.loss, sides[0].loss), (side.grad_norm, sides[0].grad_norm)):
            if abs(found / expected - 1) > tolerance:
                raise RuntimeError(f"{side.name} has loss and gradient norm {side.loss}, {side.grad_norm}; "
                                   f"{sides[0].name} has {sides[0].loss}, {sides[0].grad_norm}")
    hook.remove()
    return 1 - language / whole


def take_turns(sides: Sequence[Side], warmup: int, repetitions: int) -> None:
    """Time each side's steps turn by turn: A B A B ..."""
    import torch.distributed as dist
    from tqdm import tqdm

    from megamed.runtime import synchronize

    quiet = dist.get_rank() > 0 or None  # None: only at a terminal
    for turn in tqdm(range(warmup + repetitions), desc="steps", unit="turn", disable=quiet, file=sys.stderr):
        for side in sides:
            synchronize()
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            side.train()
            synchronize()
            cpu = time.process_time() - cpu
            dist.barrier()
            wall = time.perf_counter() - wall
            cpu = over_ranks(cpu)
            if turn >= warmup:
                side.wall.append(wall)
                side.cpu.append(cpu)


def table(layout: str, num_ranks: int, sides: Sequence[Side], with_cpu: bool) -> str:
    """What was measured, in Markdown; times and FLOPs beside those of the first side."""
    heads = ["layout", "ranks", "encoded by", "frames encoded", "GFLOP", "FLOPs ratio", "step, ms", "time ratio",
             "spread", *(["processor time ratio", "spread"] if with_cpu else [])]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    base = sides[0]
    for side in sides:
        cells = [layout, str(num_ranks), side.name, str(side.num_encoded), f"{side.flops / 1e9:.1f}",
                 f"{side.flops / base.flops:.2f}", f"{1e3 * statistics.median(side.wall):.0f}"]
        for own, other in ((side.wall, base.wall), (side.cpu, base.cpu))[: 1 + with_cpu]:
            ratios = [a / b for a, b in zip(own, other, strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if side is not base else "-"
            cells += [f"{statistics.median(ratios):.2f}", spread]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> None:
    """One rank's side of one layout."""
    import megatron.core
    import torch
    import torch.distributed as dist

    from megamed import runtime
    from megamed.utils import UserError, log

    if "," in args.layouts:
        raise UserError("under torchrun one layout can be measured: give it with --layouts", everywhere=True)
    torch.set_num_threads(args.threads)
    log.setup(runtime.global_rank(), level="WARNING")
    runtime.start()
    job, microbatches, sides = build(args, args.layouts)
    share = compare(job, microbatches, sides)
    say(f"{args.layouts}: all sides have loss {sides[0].loss:.6f} and gradient norm {sides[0].grad_norm:.6f}; timing")
    take_turns(sides, args.warmup, args.repetitions)
    if dist.get_rank():
        return
    on_cpu = runtime.device_type() == "cpu"
    machine = f"{os.cpu_count()}-core {platform.machine()} machine" if on_cpu else torch.cuda.get_device_name()
    num_ranks, documents = dist.get_world_size(), sum(len(m.sample_ids) for m in microbatches)
    print(f"\n{num_ranks} processes on {machine}; Python {platform.python_version()}, torch {torch.__version__}, "
          f"megatron-core {megatron.core.__version__}, {str(job.dtype).removeprefix('torch.')}")
    print(f"{args.model}, a step of {documents} documents of {args.frames} frames a replica in rows of "
          f"{args.seq_length} tokens; encoder {share:.0%} of the model FLOPs; {args.repetitions} turns\n")
    print(table(args.layouts, num_ranks, sides, with_cpu=on_cpu), flush=True)


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    from megamed.runtime.process import run

    run(lambda: measure(parsed) if "RANK" in os.environ else start_ranks(parsed))
