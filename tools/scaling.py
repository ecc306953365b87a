"""From few GPUs to thousands: where each layout stops scaling, and why. Computed by preflight, not measured.

    python tools/scaling.py +exp=internvl26b cluster=h100 --out docs/scaling
    python tools/scaling.py +exp=ct data.store=STORE cluster=h100 --gpus 64 128 256 --layout tensor=4,pipeline=2

Each layout is laid out over more and more GPUs by more and more replicas. Weakly: so many rows a GPU, so that the batch
grows. Strongly: one batch, shared by more and more. Prints tables; FILE.svg has the plots (a cross: too much memory),
FILE.json the numbers, from which a run that was cut short goes on.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamed.utils import UserError
from megamed.utils.command import exit_code, positive
from megamed.utils.files import write_text

if TYPE_CHECKING:
    from megamed.preflight import Assessment, ClusterConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
GPUS = (64, 128, 256, 512, 1024, 2048, 2560, 5120, 10240)
LAYOUTS = ("tensor=4,pipeline=2", "tensor=2,pipeline=4,virtual_pipeline=2,context=4", "tensor=4,pipeline=2,context=8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch/pretrain.py; cluster=NAME")
    parser.add_argument("--gpus", type=positive, nargs="+", default=list(GPUS), metavar="N", help="numbers of GPUs")
    parser.add_argument("--layout", action="append", metavar="key=size,...", help="sizes of a replica; several")
    parser.add_argument("--rows-per-gpu", type=positive, default=1, metavar="N", help="weakly: rows of a step (1)")
    parser.add_argument("--rows", type=positive, default=1280, metavar="N", help="strongly: rows of a step (1280)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, without their suffixes")
    args, unknown = parser.parse_known_args()
    args.overrides += unknown
    args.layout = args.layout or list(LAYOUTS)
    return args


def assessed(args: argparse.Namespace, layout: str, gpus: int, rows: int) -> dict[str, Any]:
    """One point: what preflight says, or why there is nothing to say."""
    from megamed.preflight import assess
    from tools.preflight import cluster_of, settings

    cluster = cluster_of(argparse.Namespace(overrides=list(args.overrides), gpus=gpus, memory=None, gpus_per_node=None))
    overrides = [text for text in args.overrides if not text.startswith("cluster=")]
    sizes = [f"parallel.{size}" for size in layout.split(",")]
    tensor = any(size.startswith("tensor=") and size != "tensor=1" for size in layout.split(","))
    overrides += [*sizes, f"parallel.sequence={str(tensor).lower()}", "parallel.data=null"]
    overrides.append(f"train.microbatches={rows}")
    try:
        return point(assess(settings(overrides, gpus), cluster), cluster)
    except UserError as error:
        return {"why_not": str(error)}


def point(found: "Assessment", cluster: "ClusterConfig") -> dict[str, Any]:
    """The numbers that are kept."""
    from megamed.preflight import room

    step = found.estimate
    return {
        "gib": found.fullest[1].memory / 2**30,
        "fits": found.fullest[1].memory <= room(cluster),
        "seconds": step.seconds,
        "total": step.total,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "idle": step.bubble,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All points; those that FILE.json has already are not made again."""
    from tqdm import tqdm

    path = args.out.with_suffix(".json")
    asked = {"overrides": args.overrides, "rows": args.rows, "rows_per_gpu": args.rows_per_gpu}
    found: dict[str, Any] = {"asked": asked, "points": {}}
    if path.exists() and (known := json.loads(path.read_text()))["asked"] == asked:
        found = known
    wanted = [
        (layout, kind, gpus) for layout in args.layout for kind in ("weak", "strong") for gpus in sorted(args.gpus)
    ]
    for layout, kind, gpus in tqdm(wanted, desc="points", unit="point", disable=None):
        points = found["points"].setdefault(layout, {}).setdefault(kind, {})
        if str(gpus) not in points:
            rows = args.rows if kind == "strong" else gpus * args.rows_per_gpu
            points[str(gpus)] = assessed(args, layout, gpus, rows)
            write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def efficiency(points: dict[str, Any], gpus: str) -> float:
    """Tokens a second and GPU, over those with the fewest GPUs."""
    fewest = next(number for number, x in points.items() if "total" in x)
    rate = {number: points[number]["tokens_per_second"] / int(number) for number in (fewest, gpus)}
    return rate[gpus] / rate[fewest]


def what_grew(points: dict[str, Any], gpus: str) -> str:
    """What takes a larger share of the step than with the fewest GPUs: where the efficiency goes."""
    fewest = next(x for x in points.values() if "total" in x)
    here = points[gpus]
    grown = {
        name: seconds / here["total"] - fewest["seconds"].get(name, 0.0) / fewest["total"]
        for name, seconds in here["seconds"].items()
    }
    name = max(grown, key=lambda key: grown[key])
    return f"{name}: {here['seconds'][name] / here['total']:.0%} of the step" if grown[name] > 0.005 else ""


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = []
    for kind, title in (("weak", "Weak scaling"), ("strong", "Strong scaling")):
        lines += [f"**{title}**", ""]
        lines += [
            "| layout of a replica | GPUs | GiB | s a step | tokens/s | MFU | stages idle | efficiency | grown most |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for layout, kinds in found["points"].items():
            for gpus, x in kinds[kind].items():
                head = f"| {layout.replace(',', ', ')} | {int(gpus):,} |"
                if "total" not in x:
                    lines.append(f"{head} - | - | - | - | - | - | {x['why_not'].split('; ')[0]} |")
                    continue
                cells = (
                    f"{x['gib']:.1f}{'' if x['fits'] else ', too much'}", f"{x['total']:.2f}",
                    f"{x['tokens_per_second']:,.0f}", f"{x['mfu']:.1%}", f"{x['idle']:.1%}",
                    f"{efficiency(kinds[kind], gpus):.0%}", what_grew(kinds[kind], gpus),
                )  # fmt: skip
                lines.append(f"{head} {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Throughput of a GPU, and what a step's time goes to, weakly and strongly."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "scaling", "font.size": 8, "svg.fonttype": "none"})
    from matplotlib import pyplot

    names = list(found["points"])
    size = 3.2 * (1 + len(names)), 5.8
    figure, axes = pyplot.subplots(2, 1 + len(names), figsize=size, layout="constrained", squeeze=False)
    every = [x for kinds in found["points"].values() for points in kinds.values() for x in points.values()]
    shares: dict[str, float] = {}  # the largest of each part
    for x in (x for x in every if "total" in x):
        for part, seconds in x["seconds"].items():
            shares[part] = max(shares.get(part, 0.0), seconds / x["total"])
    kept = sorted(part for part, share in shares.items() if share > 0.02)
    for row, kind in enumerate(("weak", "strong")):
        speed = axes[row][0]
        for column, name in enumerate(names, 1):
            there = {int(n): x for n, x in found["points"][name][kind].items() if "total" in x}
            speed.plot(
                list(there), [x["tokens_per_second"] / n for n, x in there.items()], "o-", label=name, markersize=3
            )
            for n, x in there.items():
                if not x["fits"]:
                    speed.plot([n], [x["tokens_per_second"] / n], "x", color="black", markersize=7)
            parts = [[x["seconds"].get(part, 0.0) / x["total"] for x in there.values()] for part in kept]
            plot = axes[row][column]
            plot.stackplot(list(there), parts, labels=kept, colors=[f"C{i}" for i in range(len(kept))])
            plot.set(xscale="log", ylim=(0, 1), xlabel="GPUs", ylabel="share of a step")
            plot.set_title(name, fontsize=7)
        top = max(max(line.get_ydata()) for line in speed.lines)
        speed.set(xscale="log", ylim=(0, 1.05 * top), xlabel="GPUs", ylabel="tokens/s of a GPU")
        speed.set_title(f"{kind} scaling")
    axes[0][0].legend(fontsize=6, loc="lower left")
    axes[0][1].legend(fontsize=6, loc="lower left")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)


def run(args: argparse.Namespace) -> None:
    """Make the points, then tables and plots."""
    from megamed.preflight import quieten
    from megamed.utils.optional import require

    require("matplotlib", "The plot", "pip install -c constraints.txt matplotlib")
    quieten()
    found = measure(args)
    draw(found, args.out.with_suffix(".svg"))
    print(tables(found))


def main() -> int:
    args = parse()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of torch's notes on the meta device
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: shapes are made where no GPU is
    sys.path.insert(0, str(CONF.parent))  # for the tool beside this one
    return exit_code(lambda: run(args), "the points that are there are kept; run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
