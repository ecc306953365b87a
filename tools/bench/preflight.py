"""Preflight against a step that is really run: memory of each rank, and on a GPU the time of a step.

    torchrun --nproc-per-node 8 tools/bench/preflight.py +exp=internvl26b cluster=h100
    python tools/bench/preflight.py +exp=internvl26b cluster=h200 parallel=single \\
        model.language.num_layers=6 model.vision.num_layers=12 data.seq_length=8192 train.microbatches=2

Takes what tools/preflight.py takes. Rows are full of frames, whose pixels are random. On a GPU memory is what torch's
allocator gave at the most, since the start; on a CPU, which has none, the storages of a step, by preflight's own rule.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamed.utils.command import positive

if TYPE_CHECKING:
    from torch import Tensor

    from megamed.data import Frame
    from megamed.train import JobConfig

ROOT = Path(__file__).resolve().parents[2]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch/pretrain.py; cluster=NAME")
    parser.add_argument("--repetitions", type=positive, default=5, help="timed steps (default: 5)")
    parser.add_argument("--warmup", type=positive, default=2, help="steps before them (default: 2)")
    args, unknown = parser.parse_known_args()
    args.overrides += unknown
    return args


def predicted(overrides: Sequence[str], gpus: int) -> dict[str, Any]:
    """What tools/preflight.py says, in a process of its own that sees no GPU."""
    from megamed.preflight import alone_without_gpu

    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "numbers.json"
        # So much memory that it fits, whatever it is: no changes are tried.
        command = [sys.executable, str(ROOT / "tools" / "preflight.py"), *overrides, "--gpus", str(gpus)]
        command += ["--memory", "1e6", "--json", str(numbers), "--every-layer"]
        subprocess.run(command, env=alone_without_gpu(), check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(numbers.read_text())["layouts"][0]
    return found


def run_steps(config: "JobConfig", args: argparse.Namespace) -> dict[str, Any]:
    """Bytes that this rank takes, and seconds of its steps."""
    import torch

    from megamed import preflight, runtime, train

    mesh = runtime.build_mesh(config.parallel, config.ulysses, config.document_multiple)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    job = train.build_job(config, mesh)
    vision, device = config.model.vision, runtime.current_device()
    rows = [preflight.filled_row(config)] * (config.train.microbatches // mesh.data_size)
    size = vision.num_channels, vision.image_size, vision.image_size
    pixels = torch.rand(config.model.frames_per_pass, *size, dtype=job.dtype)

    def load(frames: Sequence["Frame"]) -> "Tensor":
        return pixels[: len(frames)].to(device)

    if device.type == "cpu":
        held = preflight.held_by(job.model, job.optimizer).total
        peak, *_ = preflight.trace_step(job.model, job.phase, job.optimizer, mesh, rows, load)
        return {"bytes": held + peak.most, "seconds": []}
    seconds = []
    for _ in range(args.warmup + args.repetitions):
        runtime.synchronize()
        began = time.perf_counter()
        job.stepper.train(rows, load, job.optimizer)
        runtime.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"bytes": torch.cuda.max_memory_allocated(), "seconds": seconds[args.warmup :]}


def main(args: argparse.Namespace) -> None:
    """Print the comparison."""
    import torch.distributed as dist

    from megamed import runtime
    from tools.bench.train_step import environment
    from tools.preflight import cluster_of, settings

    names = [text for text in args.overrides if text.startswith("cluster=")]
    world_size = runtime.world_size()
    cluster_of(argparse.Namespace(overrides=names, gpus=world_size, gpus_per_node=None, memory=None))
    config = settings([text for text in args.overrides if text not in names], world_size)
    if runtime.device_type() == "cpu":
        config.train.dtype = "fp32" if "train.dtype=bf16" not in args.overrides else "bf16"
    runtime.start()
    rank = runtime.global_rank()
    asked = [*args.overrides, f"train.dtype={config.train.dtype}"]
    said = predicted(asked, world_size) if rank == 0 else {}
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, run_steps(config, args))
    if rank:
        return
    print(environment())
    print("\n| rank | preflight, GiB | measured | preflight / measured |\n|---|---|---|---|")
    for number, of_rank in said["ranks"].items():
        guess = sum(of_rank["held"].values()) + max(of_rank["peak"]["phases"].values())
        real = found[int(number)]["bytes"]
        print(f"| {number} | {guess / 2**30:.3f} | {real / 2**30:.3f} | {guess / real:.3f} |")
    if found[0]["seconds"]:
        guess, real = sum(said["seconds"].values()), found[0]["seconds"]
        ratios = [guess / seconds for seconds in real]
        print(f"\nA step: preflight {guess:.3f} s, measured {statistics.median(real):.3f} s; preflight / measured "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    else:
        print("\nThe time of a step is compared on a GPU alone.")


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    sys.path.insert(0, str(ROOT))  # for the tools
    from megamed.runtime.process import run

    run(partial(main, parsed))
