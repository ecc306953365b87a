"""Before the queue: what the ranks of a job hold, and whether that fits.

    python tools/preflight.py +exp=internvl26b cluster=h100x64
    python tools/preflight.py +exp=gpu64 cluster=a100x64 parallel.tensor=8
    python tools/preflight.py +exp=ct data.store=STORE --gpus 8 --memory 80

Takes the overrides of launch/pretrain.py, and a cluster of conf/cluster/. A rank of each pipeline stage is built, as
training builds it, in a job of the full world size: on this machine, without a GPU and without memory for the weights.

Counted, to the byte, is what is there from the first step to the last: weights, gradients, optimizer state. **Not
counted yet** are activations, frames and logits, which take what is left: docs/preflight.md. Exit code: 0 if it fits,
1 if not, 2 for what you can mend.
"""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megamed.utils import UserError
from megamed.utils.command import exit_code, positive

if TYPE_CHECKING:
    from megamed.preflight import ClusterConfig, Held
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


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:,.2f}"


def report(config: "JobConfig", cluster: "ClusterConfig", held: dict[int, "Held"]) -> str:
    """A table of the stages, and the verdict."""
    p, usable = config.parallel, cluster.memory_gib - cluster.reserved_gib
    data = cluster.gpus // (p.tensor * p.pipeline * p.context)
    lines = [
        f"{config.model.name}: {cluster.gpus} GPUs{f' ({cluster.gpu})' if cluster.gpu else ''} = tensor {p.tensor} x "
        f"pipeline {p.pipeline} x context {p.context} x data {data}; expert {p.expert}; {config.train.dtype}",
        "",
        f"| rank | stage | weights, GiB | gradients | optimizer | held | left of {usable:.1f} GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, (rank, x) in enumerate(held.items()):
        cells = [gib(x.weights), gib(x.gradients), gib(x.optimizer), gib(x.total), gib(usable * 2**30 - x.total)]
        lines.append(f"| {rank} | {stage} | {' | '.join(cells)} |")
    lines += ["", f"{cluster.memory_gib:g} GiB a GPU, of which {cluster.reserved_gib:g} are assumed to be taken."]
    return "\n".join(lines)


def verdict(config: "JobConfig", cluster: "ClusterConfig", held: dict[int, "Held"]) -> str | None:
    """Why it cannot fit, and the cheapest change that there is a word for; None if it may."""
    rank, most = max(held.items(), key=lambda item: item[1].total)
    if most.total <= (cluster.memory_gib - cluster.reserved_gib) * 2**30:
        return None
    p = config.parallel
    if not config.optim.distributed:
        mend = "set optim.distributed=true, which shares the optimizer's state over the replicas"
    else:
        mend = f"raise parallel.tensor (now {p.tensor}) or parallel.pipeline (now {p.pipeline}), or take more GPUs"
    return f"does not fit: rank {rank} holds {gib(most.total)} GiB before any activation; {mend}"


def run(args: argparse.Namespace) -> int:
    """Build the ranks; 1 if they cannot fit."""
    from tqdm import tqdm

    from megamed.config import compose, load
    from megamed.preflight import held_by_rank, stage_ranks
    from megamed.train import JobConfig
    from megamed.train.run import adopt_hf, check_values
    from megamed.utils import log

    log.setup(0, level="WARNING")
    cluster = cluster_of(args)
    config = load(JobConfig, compose(CONF, "pretrain", args.overrides))
    if config.train.dtype == "auto":
        config.train.dtype = "bf16"  # which it is on a GPU, whatever this machine has
    adopt_hf(config)
    check_values(config)
    config.validate(cluster.gpus)
    chosen = tqdm(stage_ranks(config, cluster.gpus), desc="ranks", unit="rank", disable=None)
    held = {rank: held_by_rank(config, rank, cluster.gpus) for rank in chosen}
    print(report(config, cluster, held))
    if args.json:
        values = {"cluster": asdict(cluster), "ranks": {rank: asdict(x) for rank, x in held.items()}}
        args.json.write_text(json.dumps(values, indent=1) + "\n")
    problem = verdict(config, cluster, held)
    print(problem or "What is held fits; activations, frames and logits are not counted yet.")
    return int(problem is not None)


def main() -> int:
    args = parse()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: shapes are made where no GPU is
    codes: list[int] = []
    code = exit_code(lambda: codes.append(run(args)), "nothing was changed")
    return code or codes[0]


if __name__ == "__main__":
    sys.exit(main())
