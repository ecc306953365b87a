"""The needle test: a model learns to say which of 256 frames carries a mark, at several context-parallel layouts.

    python tools/needle.py --context 1 4 2x2 --control --out docs/needle.svg
    python tools/needle.py --replot --out docs/needle.svg

Each layout trains by itself from the same initial weights on the same rows, so the learning curves have to lie on
each other until rounding, which differs, has grown; --control shows how fast it grows in one layout alone. Beside
the plot stands a JSON file of the same name with the curves, from which --replot draws again.
"""

import argparse
import json
import math
import os
import platform
import signal
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megamed.utils import UserError
from megamed.utils.command import positive, run_ranks
from megamed.utils.optional import require

RANK = Path(__file__).resolve().with_name("needle_rank.py")
# Steps over which layouts are compared. Later, what began as rounding has grown with every step of Adam.
NUM_COMPARED = 50
# Of a middle brightness: they are read on white and on black.
INK, COLOURS = "#808080", ("#3b82f6", "#f59e0b", "#10b981", "#d946ef")


@dataclass(frozen=True)
class Layout:
    """Context ranks: those that pass keys and values round, and those that trade heads."""

    ring: int
    ulysses: int


def layout(text: str) -> Layout:
    """`4` is a ring of 4, `2x2` a ring of 2 with 2 Ulysses ranks each."""
    ring, _, ulysses = text.partition("x")
    parsed = Layout(int(ring), int(ulysses or 1))
    if parsed.ring < 1 or parsed.ulysses < 1:
        raise ValueError(text)
    return parsed


def picture(text: str) -> Path:
    """The name of a plot."""
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .svg or .png")
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=layout, nargs="+", default=[Layout(1, 1), Layout(4, 1)], metavar="LAYOUT",
                        help="layouts, the first of which the others are compared with: context ranks in a ring, "
                             "or ring x ulysses such as 2x2 (default: 1 4)")
    parser.add_argument("--control", action="store_true",
                        help="also train the first layout from weights that differ in their last bit")
    parser.add_argument("--steps", type=positive, default=500, help="optimizer steps (default: 500)")
    parser.add_argument("--every", type=positive, default=25, help="steps between held-out questions (default: 25)")
    parser.add_argument("--asked", type=positive, default=256,
                        help="held-out questions after the last step; a quarter of them before (default: 256)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and data (default: 1)")
    parser.add_argument("--out", type=picture, default=Path("docs/needle.svg"), metavar="FILE",
                        help="the plot, .svg or .png (default: docs/needle.svg)")
    parser.add_argument("--replot", action="store_true", help="draw the curves that are there, without training")
    return parser.parse_args()


def train(where: Layout, args: argparse.Namespace, nudged: bool = False) -> dict[str, Any]:
    """Train at one layout, in processes of its own, and return its curve.

    Args:
        where: the layout.
        args: the command line.
        nudged: start from weights that differ in their last bit.

    Raises:
        UserError: a process failed; what it said is on the screen.
    """
    with tempfile.TemporaryDirectory() as folder:
        curve = Path(folder) / "curve.json"
        num_ranks = where.ring * where.ulysses
        arguments = [
            *("--curve", str(curve)),
            *("--ring", str(where.ring), "--ulysses", str(where.ulysses), "--steps", str(args.steps)),
            *("--seed", str(args.seed), "--every", str(args.every), "--asked", str(args.asked)),
            *(["--nudged"] if nudged else []),
        ]
        if code := run_ranks(RANK, num_ranks, arguments):
            raise UserError(f"the run at ring {where.ring} x ulysses {where.ulysses} failed with code {code}")
        return json.loads(curve.read_text())


def name(curve: dict[str, Any]) -> str:
    """What the legend calls a layout."""
    ring, ulysses = curve["ring"], curve["ulysses"]
    split = f" (ring {ring} x ulysses {ulysses})" if ulysses > 1 else ""
    return f"context {ring * ulysses}{split}{', last bits changed' if curve['nudged'] else ''}"


def differences(reference: list[float], losses: list[float]) -> list[float]:
    """Relative difference of each step's loss."""
    return [abs(b / a - 1) for a, b in zip(reference, losses, strict=True)]


def summary(curves: list[dict[str, Any]]) -> str:
    """A Markdown table of the layouts."""
    lines = [
        f"| layout | right | right with blank frames | last loss | loss, first {NUM_COMPARED} steps | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for index, curve in enumerate(curves):
        apart = max(differences(curves[0]["losses"], curve["losses"])[:NUM_COMPARED])
        lines.append(
            f"| {name(curve)} | {curve['right']} of {curve['asked']} | {curve['blank']} of {curve['asked']} "
            f"| {curve['losses'][-1]:.4f} | {f'{apart:.1e}' if index else 'reference'} | {curve['seconds']:.0f} |"
        )
    return "\n".join(lines)


def plot(curves: list[dict[str, Any]], out: Path) -> None:
    """Draw losses, held-out answers and, of several layouts, how far their losses are apart."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({
        "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
        "axes.spines.top": False, "axes.spines.right": False,
        "svg.fonttype": "none", "svg.hashsalt": "needle", "font.size": 9,
    })  # fmt: skip
    from matplotlib import pyplot

    num_panels = 3 if len(curves) > 1 else 2
    figure, panels = pyplot.subplots(num_panels, 1, sharex=True, figsize=(7, 2 * num_panels), layout="constrained")
    steps = range(1, len(curves[0]["losses"]) + 1)
    for index, curve in enumerate(curves):
        colour, label = COLOURS[index % len(COLOURS)], name(curve)
        # Each a little thinner than the one below it, so that curves that lie on each other can all be seen.
        line = {"color": colour, "label": label, "linewidth": 3.5 / (1 + index), "solid_capstyle": "butt"}
        panels[0].plot(steps, curve["losses"], **line)
        panels[1].plot(*zip(*curve["accuracy"], strict=True), marker="o", markersize=5 / (1 + index), **line)
        if index:
            apart = differences(curves[0]["losses"], curve["losses"])
            panels[2].semilogy(steps, [value or math.nan for value in apart], color=colour, linewidth=0.7)
    panels[0].set_ylabel("training loss, nats")
    panels[1].set_ylabel("right answers, held out")
    panels[1].axhline(1 / 256, color=INK, linestyle=":", linewidth=1, label="chance")
    if len(curves) > 1:
        panels[2].set_ylabel(f"relative difference\nof loss to {name(curves[0])}")
    panels[-1].set_xlabel("optimizer step")
    panels[1].legend(frameon=False)
    unfinished = out.with_name(f".{out.stem}.part{out.suffix}")
    no_date = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(unfinished, transparent=True, dpi=120, metadata=no_date)
    pyplot.close(figure)
    os.replace(unfinished, out)


def save(results: dict[str, Any], path: Path) -> None:
    """Write the curves; a killed run leaves the old file or the new one."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(results) + "\n")
    os.replace(unfinished, path)


def main(args: argparse.Namespace) -> None:
    require("matplotlib", "The plot", "pip install -c constraints.txt matplotlib")
    data = args.out.with_suffix(".json")
    if args.replot:
        if not data.is_file():
            raise UserError(f"{data} is missing: train first, without --replot")
        results = json.loads(data.read_text())
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        curves = [train(where, args) for where in args.context]
        if args.control:
            curves.append(train(args.context[0], args, nudged=True))
        results = {
            "steps": args.steps,
            "seed": args.seed,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "megatron-core")},
            "curves": curves,
        }
        save(results, data)
    plot(results["curves"], args.out)
    print(summary(results["curves"]))
    print(f"{args.out}, {data}", file=sys.stderr)


if __name__ == "__main__":
    parsed = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(parsed)
    except UserError as error:
        sys.exit(f"needle: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
