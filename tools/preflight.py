"""Before the queue: what the ranks of a job take, whether that fits, and if not, what would.

    python tools/preflight.py +exp=internvl26b cluster=h100x64
    python tools/preflight.py +exp=internvl26b cluster=a100x64 parallel.tensor=8
    python tools/preflight.py +exp=ct data.store=STORE --gpus 8 --memory 80
    python tools/preflight.py +exp=internvl26b cluster=h100x64 --search

Takes the overrides of launch/pretrain.py, and a cluster of conf/cluster/: NAMExN is N GPUs of NAME.yaml. The first rank
of the first and of the last pipeline stage are built, as training builds them, in a job of the full world size, and
take a step: on this machine, without a GPU and without memory for anything. Weights, gradients and optimizer state are
counted to the byte; activations, frames, logits and buffers as the step allocates them, with rows that are full of
frames; FLOPs and bytes as operations and collectives ask for them. Seconds are a model (docs/preflight.md). Where the
job does not fit, changes are tried, one after the other, until one does.

Exit code: 0 if it fits, 1 if not, 2 for what you can mend.
"""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamed.utils import UserError
from megamed.utils.command import exit_code, positive

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from megamed.preflight import Assessment, ClusterConfig
    from megamed.train import JobConfig

CONF = Path(__file__).resolve().parents[1] / "conf"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch/pretrain.py; cluster=NAME")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run's config.yaml, in the place of conf/")
    parser.add_argument("--gpus", type=positive, help="instead of the cluster's number")
    parser.add_argument("--gpus-per-node", type=positive, help="instead of the cluster's number")
    parser.add_argument("--memory", type=float, metavar="GIB", help="instead of the cluster's memory of a GPU")
    parser.add_argument("--search", action="store_true", help="rank all layouts of so many GPUs for this job")
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="layouts that --search prints (10)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="processes of --search (one a core, 8 at most)")
    parser.add_argument("--every-layer", action="store_true", help="trace all layers, not work them out from a few")
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
        raise UserError("name the GPUs: cluster=NAME of conf/cluster/ (h100x64, say), or --gpus N --memory GIB")
    cluster = load_cluster(CONF, names[-1]) if names else ClusterConfig()
    cluster.gpus = args.gpus or cluster.gpus
    cluster.gpus_per_node = args.gpus_per_node or cluster.gpus_per_node
    cluster.memory_gib = args.memory or cluster.memory_gib
    return cluster


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:,.2f}"


def table(head: "Sequence[str]", rows: "Iterable[Sequence[str]]") -> list[str]:
    """Lines of a Markdown table, then an empty one."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def memory_table(found: "Assessment") -> list[str]:
    """What the two ends of the pipeline take."""
    from megamed.preflight import LANGUAGE, VISION_BACKWARD, VISION_FORWARD, room

    usable, num_ranks = room(found.cluster), found.cluster.gpus
    phases = VISION_FORWARD, LANGUAGE, VISION_BACKWARD
    rows = []
    for number, rank in found.ranks.items():
        held = rank.held.weights, rank.held.gradients, rank.held.optimizer
        sizes = *held, *(rank.peak.phases[phase] for phase in phases), rank.memory, usable - rank.memory
        stage = number * found.config.parallel.pipeline // num_ranks
        rows.append([str(number), str(stage), *map(gib, sizes)])
    head = ["rank", "stage", "weights, GiB", "gradients", "optimizer", *phases, "most", f"left of {gib(usable)}"]
    return table(head, rows)


def parts_table(found: "Assessment") -> list[str]:
    """What the step's memory is for, on each rank when it is most."""
    from megamed.preflight import PARTS

    rows = []
    for number, rank in found.ranks.items():
        phase = max(rank.peak.phases, key=lambda name: rank.peak.phases[name])
        parts = rank.peak.parts[phase]
        rows.append([str(number), phase, *(gib(parts.get(part, 0)) for part in PARTS)])
    return table(["rank", "fullest in", *(f"{part}, GiB" for part in PARTS)], rows)


def time_table(found: "Assessment") -> list[str]:
    """What a step's time goes to."""
    step = found.estimate
    parts = sorted(step.seconds.items(), key=lambda item: -item[1])
    rows = [[name, f"{seconds:.3f}", f"{seconds / step.total:.1%}"] for name, seconds in parts if seconds]
    return table(["of a step", "s", "share"], rows)


def link_table(found: "Assessment") -> list[str]:
    """What the first rank sends in a step."""
    from megamed.preflight import Sent, transfer_seconds

    rank, cluster = found.ranks[0], found.cluster
    sums: dict[tuple[str, str], Sent] = {}
    for work in rank.work.values():
        for key, sent in work.transfers.items():
            sums[key] = sums.get(key, Sent()) + sent
    rows = []
    for (axis, operation), sent in sums.items():
        ranks = rank.groups[axis]
        seconds = transfer_seconds(operation, sent, ranks, cluster)
        link = f"{cluster.link_name(ranks)}, {cluster.link_gb_s(operation, ranks):.0f} GB/s"
        cells = axis, operation, str(len(ranks)), link, f"{sent.calls:,.0f}", f"{sent.sent / 1e9:.3f}", f"{seconds:.3f}"
        rows.append(cells)
    return table(["axis", "operation", "ranks", "over", "times", "GB sent", "s"], rows)


def report(found: "Assessment") -> str:
    """Everything about one layout."""
    config, cluster, step = found.config, found.cluster, found.estimate
    p = config.parallel
    data = p.data_size(cluster.gpus)
    flops = sum(work.flops for work in found.ranks[0].work.values())
    about = f" ({cluster.gpu})" if cluster.gpu else ""
    lines = [
        f"{config.model.name}: {cluster.gpus} GPUs{about} = tensor {p.tensor} x pipeline {p.pipeline} x context "
        f"{p.context} (ring {config.attention.ring} x Ulysses {config.attention.ulysses}) x data {data}; "
        f"expert {p.expert}; {config.train.dtype}; {config.train.microbatches // data} rows of "
        f"{config.data.seq_length:,} tokens a replica",
        "",
        *memory_table(found),
        *parts_table(found),
        f"{cluster.memory_gib:g} GiB a GPU, of which {cluster.reserved_gib:g} are assumed to be taken.",
        "",
        *time_table(found),
        *link_table(found),
        f"A step takes {step.total:.2f} s: {step.tokens_per_second:,.0f} tokens/s, MFU {step.mfu:.1%}; "
        f"{flops / 1e12:,.0f} TFLOP on rank 0, {step.model_flops / 1e12:,.0f} TFLOP of the model on all; the pipeline "
        f"is idle for {step.bubble:.1%} of the language phase. Most of the time goes to: {step.limit}.",
        f"Computed, not measured: assumed is {cluster.products:.0%} of {cluster.peak_tflops:g} TFLOP/s in matrix "
        f"products, {cluster.attention:.0%} in attention, {cluster.bandwidth:.0%} of every bandwidth.",
    ]
    return "\n".join(lines)


def search_report(found: "Sequence[Assessment]") -> str:
    """The best layouts."""
    rows = []
    for x in found:
        step, p = x.estimate, x.config.parallel
        layout = (
            f"{p.tensor} x {p.pipeline}{f' ({p.virtual_pipeline} chunks)' if p.virtual_pipeline > 1 else ''} x "
            f"{p.context} x {p.data_size(x.cluster.gpus)}"
        )
        memory = gib(x.fullest[1].memory) + ("" if x.fits else ", **too much**")
        cells = f"{step.total:.2f}", f"{step.tokens_per_second:,.0f}", f"{step.mfu:.1%}", f"{step.bubble:.1%}"
        rows.append([layout, f"{p.expert} x {p.expert_tensor}", memory, *cells, step.limit])
    head = ["tensor x pipeline x context x data", "expert x its tensor", "GiB", "s a step", "tokens/s", "MFU"]
    return "\n".join(table([*head, "pipeline idle", "most time goes to"], rows))


def changes(config: "JobConfig") -> list[str]:
    """What may help, the cheapest first: what costs no time, then what computes again, then what splits more."""
    p, found = config.parallel, []
    if not config.optim.distributed:
        found.append("optim.distributed=true")
    frames = config.model.frames_in_flight
    if frames is None:
        found.append(f"model.frames_in_flight={config.model.frames_per_pass}")
    if not config.model.vision.recompute:
        found.append("model.vision.recompute=true")
    if not config.model.language.recompute:
        found.append("model.language.recompute=true")
    found += [f"parallel.{key}={2 * getattr(p, key)}" for key in ("context", "tensor", "pipeline")]
    fewer = frames or config.model.frames_per_pass
    return found + [f"model.frames_in_flight={n}" for n in (fewer // 2, fewer // 4, fewer // 8) if n]


def settings(overrides: list[str], world_size: int | None, file: Path | None = None) -> "JobConfig":
    """The job, checked; its layout, too, unless the world size is None."""
    from megamed.config import compose, load
    from megamed.train import JobConfig
    from megamed.train.run import adopt_hf, check_values

    values = file or CONF / "pretrain.yaml"
    config = load(JobConfig, compose(values.parent, values.stem, overrides))
    if config.train.dtype == "auto":
        config.train.dtype = "bf16"  # which it is on a GPU, whatever this machine has
    adopt_hf(config)
    check_values(config)
    if world_size is not None:
        config.validate(world_size)
    return config


def look_for_mend(args: argparse.Namespace, cluster: "ClusterConfig", config: "JobConfig") -> str | None:
    """The first change with which it fits; each is added to those before that split nothing."""
    from tqdm import tqdm

    from megamed.preflight import assess

    kept: list[str] = []
    for change in tqdm(changes(config), desc="changes", unit="change", disable=None, leave=False):
        tried = [*kept, change]
        try:
            found = assess(settings([*args.overrides, *tried], cluster.gpus, args.config), cluster)
        except UserError:
            continue  # the layout does not allow it
        if found.fits:
            return " ".join(tried)
        if not change.startswith("parallel."):
            kept = tried
    return None


def find_best(config: "JobConfig", cluster: "ClusterConfig", args: argparse.Namespace) -> int:
    """Rank layouts; 1 if none fits."""
    from tqdm import tqdm

    from megamed.preflight import layouts, search

    total = sum(map(len, layouts(config, cluster)))
    with tqdm(total=total + min(args.top, total), desc="layouts", unit="layout", disable=None, leave=False) as bar:
        found = search(config, cluster, args.top, args.jobs, bar.update)
    if not found:
        config.validate(cluster.gpus)  # says what is wrong with the one that is set
        raise UserError(f"no layout of {cluster.gpus} GPUs goes with this job; choose another number of GPUs")
    print(f"{total} layouts of {cluster.gpus} GPUs, the best {len(found)}; computed, not measured.\n")
    print(search_report(found))
    if args.json:
        write_json(args.json, cluster, found)
    if found[0].fits:
        print(f"The fastest: {found[0].name}")
        return 0
    print(f"none fits: the smallest takes {gib(found[0].fullest[1].memory)} GiB; take more or larger GPUs")
    return 1


def write_json(path: Path, cluster: "ClusterConfig", found: "Sequence[Assessment]") -> None:
    """All numbers, for programs."""

    def numbers(x: "Assessment") -> dict[str, Any]:
        ranks = {}
        for number, rank in x.ranks.items():
            work = {
                phase: {
                    "computed": {kind: asdict(amount) for kind, amount in of_phase.computed.items()},
                    "sent": [
                        {"axis": axis, "operation": operation, "ranks": len(rank.groups[axis]), **asdict(sent)}
                        for (axis, operation), sent in of_phase.transfers.items()
                    ],
                }
                for phase, of_phase in rank.work.items()
            }
            ranks[number] = {"held": asdict(rank.held), "peak": asdict(rank.peak), "work": work}
        step = x.estimate
        return {
            "layout": asdict(x.config.parallel), "fits": x.fits, "seconds": step.seconds, "mfu": step.mfu,
            "tokens_per_second": step.tokens_per_second, "ranks": ranks,
        }  # fmt: skip

    content = {"cluster": asdict(cluster), "layouts": [numbers(x) for x in found]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def run(args: argparse.Namespace) -> int:
    """Build the ranks; 1 if they cannot fit."""
    from tqdm import tqdm

    from megamed.preflight import assess, quieten

    quieten()
    cluster = cluster_of(args)
    if args.search:
        return find_best(settings(args.overrides, None, args.config), cluster, args)
    config = settings(args.overrides, cluster.gpus, args.config)
    found = assess(
        config, cluster, args.every_layer,
        progress=lambda ranks: tqdm(ranks, desc="ranks", unit="rank", disable=None, leave=False),
    )  # fmt: skip
    print(report(found))
    if args.json:
        write_json(args.json, cluster, [found])
    if found.fits:
        print("It fits.")
        return 0
    number, rank = found.fullest
    mend = look_for_mend(args, cluster, config)
    help_ = f"it fits with {mend}" if mend else "no single change helps: look at all layouts with --search"
    print(f"does not fit: rank {number} takes {gib(rank.memory)} GiB; {help_}")
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
