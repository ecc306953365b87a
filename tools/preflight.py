"""Before the queue: what the ranks of a job take, whether that fits, and if not, what would.

    python tools/preflight.py +exp=internvl26b cluster=h100x64
    python tools/preflight.py +exp=internvl26b cluster=a100x64 parallel.tensor=8
    python tools/preflight.py +exp=ct data.store=STORE --gpus 8 --memory 80

Takes the overrides of launch/pretrain.py, and a cluster of conf/cluster/. A rank of each pipeline stage is built, as
training builds it, in a job of the full world size, and takes one step: on this machine, without a GPU and without
memory for anything. Weights, gradients and optimizer state are counted to the byte; activations, frames, logits and
buffers as the step allocates them, with rows that are full of frames. Where it does not fit, changes are tried, one
after the other, until one does.

**Not counted yet**: what models with experts take in a step, and time: docs/preflight.md. Exit code: 0 if it fits,
1 if not, 2 for what you can mend.
"""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megamed.utils import UserError
from megamed.utils.command import exit_code, positive

if TYPE_CHECKING:
    from megamed.preflight import ClusterConfig, Held, Peak
    from megamed.train import JobConfig

CONF = Path(__file__).resolve().parents[1] / "conf"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch/pretrain.py; cluster=NAME")
    parser.add_argument("--gpus", type=positive, help="instead of the cluster's number")
    parser.add_argument("--memory", type=float, metavar="GIB", help="instead of the cluster's memory of a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    args, unknown = parser.parse_known_args()
    args.overrides += unknown
    return args


def cluster_of(args: argparse.Namespace) -> "ClusterConfig":
    """The cluster that the command line asks for; takes its word out of the overrides."""
    from megamed.preflight import ClusterConfig, load_cluster

    names = [text.removeprefix("cluster=") for text in args.overrides if text.startswith("cluster=")]
    args.overrides = [text for text in args.overrides if not text.startswith("cluster=")]
    if not names and (args.gpus is None or args.memory is None):
        raise UserError("name the GPUs: cluster=NAME of conf/cluster/, or --gpus N --memory GIB")
    cluster = load_cluster(CONF, names[-1]) if names else ClusterConfig(reserved_gib=6.0)
    cluster.gpus = args.gpus or cluster.gpus
    cluster.memory_gib = args.memory or cluster.memory_gib
    return cluster


@dataclass(frozen=True)
class Rank:
    """What a rank takes: what it holds, and the step beside it; None for a model with experts."""

    held: "Held"
    step: "Peak | None"

    @property
    def total(self) -> int:
        return self.held.total + (self.step.most if self.step else 0)


def measure(config: "JobConfig", world_size: int, quiet: bool) -> dict[int, Rank]:
    """Build a rank of each stage, and let it take a step."""
    from tqdm import tqdm

    from megamed.models.projector import tokens_per_frame
    from megamed.preflight import filled_row, held_by_rank, peak_of_rank, stage_ranks

    vision = config.model.vision
    frame_tokens = tokens_per_frame(vision.image_size, vision.patch_size, config.model.projector.downsample_ratio)
    rows = [filled_row(config, frame_tokens)] * (config.train.microbatches // config.parallel.data_size(world_size))
    found = {}
    for rank in tqdm(stage_ranks(config, world_size), desc="ranks", unit="rank", disable=quiet or None, leave=False):
        has_experts = config.model.language.moe.total_experts > 0
        step = None if has_experts else peak_of_rank(config, rank, world_size, rows)
        found[rank] = Rank(held_by_rank(config, rank, world_size), step)
    return found


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:,.2f}"


def report(config: "JobConfig", cluster: "ClusterConfig", ranks: dict[int, Rank]) -> str:
    """A table of the stages."""
    p, usable = config.parallel, cluster.memory_gib - cluster.reserved_gib
    data = cluster.gpus // (p.tensor * p.pipeline * p.context)
    lines = [
        f"{config.model.name}: {cluster.gpus} GPUs{f' ({cluster.gpu})' if cluster.gpu else ''} = tensor {p.tensor} x "
        f"pipeline {p.pipeline} x context {p.context} x data {data}; expert {p.expert}; {config.train.dtype}; "
        f"{config.train.microbatches // data} rows of {config.data.seq_length:,} tokens a replica",
        "",
        "| rank | stage | weights, GiB | gradients | optimizer | vision, forward | language | vision, backward | most "
        f"| left of {usable:.1f} GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, (rank, x) in enumerate(ranks.items()):
        phases = x.step.phases.values() if x.step else ()
        steps = [gib(size) for size in phases] if x.step else ["not counted"] * 3
        cells = [gib(x.held.weights), gib(x.held.gradients), gib(x.held.optimizer), *steps, gib(x.total)]
        lines.append(f"| {rank} | {stage} | {' | '.join(cells)} | {gib(usable * 2**30 - x.total)} |")
    lines += ["", f"{cluster.memory_gib:g} GiB a GPU, of which {cluster.reserved_gib:g} are assumed to be taken."]
    return "\n".join(lines)


def fits(ranks: dict[int, Rank], cluster: "ClusterConfig") -> bool:
    """Whether the fullest rank has room."""
    return max(x.total for x in ranks.values()) <= (cluster.memory_gib - cluster.reserved_gib) * 2**30


def changes(config: "JobConfig") -> list[str]:
    """What may help, the cheapest first: what costs no time, then what computes again, then what splits more."""
    p, found = config.parallel, []
    if not config.optim.distributed:
        found.append("optim.distributed=true")
    if config.model.frames_in_flight is None:
        found.append(f"model.frames_in_flight={config.model.frames_per_pass}")
    if not config.model.vision.recompute:
        found.append("model.vision.recompute=true")
    if not config.model.language.recompute:
        found.append("model.language.recompute=true")
    found += [f"parallel.{key}={2 * getattr(p, key)}" for key in ("context", "tensor", "pipeline")]
    return found


def settings(overrides: list[str], world_size: int) -> "JobConfig":
    """The job, checked."""
    from megamed.config import compose, load
    from megamed.train import JobConfig
    from megamed.train.run import adopt_hf, check_values

    config = load(JobConfig, compose(CONF, "pretrain", overrides))
    if config.train.dtype == "auto":
        config.train.dtype = "bf16"  # which it is on a GPU, whatever this machine has
    adopt_hf(config)
    check_values(config)
    config.validate(world_size)
    return config


def look_for_mend(overrides: list[str], cluster: "ClusterConfig", config: "JobConfig") -> str | None:
    """The first change with which it fits; each is added to those before that split nothing."""
    from tqdm import tqdm

    kept: list[str] = []
    for change in tqdm(changes(config), desc="changes", unit="change", disable=None, leave=False):
        tried = [*kept, change]
        try:
            changed = settings([*overrides, *tried], cluster.gpus)
        except UserError:
            continue  # the layout does not allow it
        if fits(measure(changed, cluster.gpus, quiet=True), cluster):
            return " ".join(tried)
        if not change.startswith("parallel."):
            kept = tried
    return None


def run(args: argparse.Namespace) -> int:
    """Build the ranks; 1 if they cannot fit."""
    from megamed.utils import log

    log.setup(0, level="WARNING")
    cluster = cluster_of(args)
    config = settings(args.overrides, cluster.gpus)
    ranks = measure(config, cluster.gpus, quiet=False)
    print(report(config, cluster, ranks))
    if args.json:
        values = {"cluster": asdict(cluster), "ranks": {rank: asdict(x) for rank, x in ranks.items()}}
        args.json.write_text(json.dumps(values, indent=1) + "\n")
    if fits(ranks, cluster):
        print("It fits." if ranks[0].step else "What is held fits; what a step takes is not counted for experts yet.")
        return 0
    rank, most = max(ranks.items(), key=lambda item: item[1].total)
    mend = look_for_mend(args.overrides, cluster, config)
    help_ = f"it fits with {mend}" if mend else "none of the changes that were tried helps: take more or larger GPUs"
    print(f"does not fit: rank {rank} takes {gib(most.total)} GiB; {help_}")
    return 1


def main() -> int:
    args = parse()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of torch's notes on the meta device
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: shapes are made where no GPU is
    codes: list[int] = []
    code = exit_code(lambda: codes.append(run(args)), "nothing was changed")
    return code or codes[0]


if __name__ == "__main__":
    sys.exit(main())
