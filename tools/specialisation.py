"""Do specialists specialise? Trains small models on a task of two domains, and counts the steps to a loss.

    python tools/specialisation.py --out runs/specialisation
    python tools/specialisation.py --out runs/specialisation --replot --docs docs

The task and the models (arms) are in specialisation_task.py: two domains whose tables contradict each other, and that
the text hardly tells apart. Compared are a dense model, experts that route freely, and specialists that the metadata
call, all with the same active parameters; two more arms are told the domain in the text. Each arm is trained from each
seed by itself; what is finished is kept in --out, so that a second call goes on with what lacks.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from megamed.utils import UserError
from megamed.utils.command import exit_code, positive
from megamed.utils.files import write_text
from megamed.utils.optional import require

INK = "#808080"  # of a middle brightness: read on white and on black
COLOURS = {
    "dense": "#94a3b8", "dense-told": "#475569", "plain": "#f472b6", "free": "#f59e0b", "free-told": "#b45309",
    "soft": "#10b981", "hard": "#3b82f6",
}  # fmt: skip
WITH, WITHHELD = 1, 2  # columns of a curve: loss with metadata, and with metadata withheld
_ticks: Any = None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results")
    parser.add_argument("--arms", nargs="+", choices=list(COLOURS), default=list(COLOURS), metavar="ARM",
                        help=f"what to train (default: all of {', '.join(COLOURS)})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of weights and data (default: 1 2 3)")
    parser.add_argument("--steps", type=positive, default=1500, help="optimizer steps (default: 1500)")
    parser.add_argument("--every", type=positive, default=25, help="steps between evaluations (default: 25)")
    parser.add_argument("--loss", type=float, default=0.5, metavar="NATS",
                        help="held-out loss that steps are counted to (default: 0.5)")
    parser.add_argument("--jobs", type=positive, default=2, help="trainings at a time, a core each (default: 2)")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="also write specialisation.json and the plots there")
    parser.add_argument("--replot", action="store_true", help="table and plots of what is there, without training")
    return parser.parse_args()


def place(out: Path, arm: str, seed: int) -> Path:
    """Where the result of one training is."""
    return out / f"{arm}-{seed}.json"


def finished(out: Path, arm: str, seed: int, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result of one training, None if there is none yet.

    Raises:
        UserError: it is damaged, or of other settings.
    """
    path = place(out, arm, seed)
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        was = result["settings"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it, and it is trained again") from error
    for key, value in wanted.items():
        if was.get(key) != value:
            raise UserError(
                f"{path}: was trained with {key}={was.get(key)}, and {value} is asked for now; give another --out"
            )
    return result


def train(out: Path, arms: Sequence[str], seeds: Sequence[int], wanted: dict[str, Any], jobs: int) -> None:
    """Train what is not finished, with a bar over all steps."""
    from tqdm import tqdm

    steps, every = wanted["steps"], wanted["every"]
    missing = [(arm, seed) for seed in seeds for arm in arms if finished(out, arm, seed, wanted) is None]
    total = steps * len(arms) * len(seeds)
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with (
        tqdm(total=total, initial=total - steps * len(missing), desc="training", unit="step", disable=None) as bar,
        ProcessPoolExecutor(jobs, context, _start, (ticks,), max_tasks_per_child=1) as pool,
    ):
        running = {pool.submit(_learn, arm, seed, steps, every, out): (arm, seed) for arm, seed in missing}
        waiting: set[Future[dict[str, Any]]] = set(running)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1.0)
                while not ticks.empty():
                    bar.update(ticks.get())
                for future in done:
                    result = {**future.result(), "settings": wanted}
                    write_text(place(out, *running[future]), json.dumps(result) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(ticks: Any) -> None:
    global _ticks
    _ticks = ticks


def _learn(arm: str, seed: int, steps: int, every: int, out: Path) -> dict[str, Any]:
    """One training, in a process of its own."""
    import torch

    from megamed import runtime
    from megamed.utils import log

    torch.set_num_threads(1)
    log.setup(0, level="WARNING")
    runtime.start()
    from specialisation_task import ARMS, learn

    routing = out / f"{arm}-{seed}.routing.jsonl" if ARMS[arm].routing else None
    if routing is not None:
        routing.unlink(missing_ok=True)  # of a training that was cut off
    return learn(arm, seed, steps, every, routing, lambda: _ticks.put(1))


def steps_to(curve: Sequence[Sequence[float]], loss: float, column: int) -> float | None:
    """Steps after which a held-out loss stays at or below another for good, interpolated between evaluations.

    Args:
        curve: [step, loss with metadata, loss with metadata withheld], by step.
        loss: to be reached.
        column: `WITH` or `WITHHELD`.

    Returns:
        None if the last evaluation is above.
    """
    last_above = max((i for i, row in enumerate(curve) if row[column] > loss), default=-1)
    if last_above == len(curve) - 1:
        return None
    if last_above < 0:
        return float(curve[0][0])
    before, after = curve[last_above], curve[last_above + 1]
    share = (before[column] - loss) / (before[column] - after[column])
    return before[0] + share * (after[0] - before[0])


def in_words(counts: Sequence[float | None]) -> str:
    """Median and range over seeds."""
    reached = [count for count in counts if count is not None]
    if len(reached) < len(counts):
        return "not reached" if not reached else f"reached from {len(reached)} of {len(counts)} seeds"
    return f"{statistics.median(reached):.0f} ({min(reached):.0f} to {max(reached):.0f})"


def table(results: dict[str, list[dict[str, Any]]], names: dict[str, str], loss: float) -> str:
    """Steps of each arm, as Markdown."""
    lines = [
        f"| model | parameters | active | steps to {loss:g} nats | metadata withheld | last loss | metadata withheld |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, of_arm in results.items():
        counts = [in_words([steps_to(r["curve"], loss, column) for r in of_arm]) for column in (WITH, WITHHELD)]
        last = [f"{statistics.median(r['curve'][-1][column] for r in of_arm):.3f}" for column in (WITH, WITHHELD)]
        sizes = [f"{of_arm[0][key]:,}" for key in ("parameters", "active_parameters")]
        lines.append(f"| {' | '.join([names[arm], *sizes, *counts, *last])} |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]], names: dict[str, str], loss: float, out: Path) -> None:
    """Learning curves: with metadata at the left, with metadata withheld at the right; a thin line for each seed."""
    matplotlib = require("matplotlib", "The plot", "pip install -c constraints.txt matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context({"font.size": 9, **colours}):
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        for panel, column, title in zip(panels, (WITH, WITHHELD), ("with metadata", "metadata withheld"), strict=True):
            for arm, of_arm in results.items():
                steps = [row[0] for row in of_arm[0]["curve"]]
                curves = [[row[column] for row in r["curve"]] for r in of_arm]
                for curve in curves:
                    panel.plot(steps, curve, color=COLOURS[arm], linewidth=0.6, alpha=0.4)
                median = [statistics.median(values) for values in zip(*curves, strict=True)]
                panel.plot(steps, median, color=COLOURS[arm], linewidth=1.8, label=names[arm])
            panel.axhline(loss, color=INK, linewidth=0.8, linestyle=":")
            panel.set_yscale("log")
            panel.set_xlabel("optimizer steps")
            panel.set_title(title)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("held-out loss of the values, nats")
        panels[0].legend(frameon=False, fontsize=8)
        figure.savefig(out, dpi=110, transparent=True)
        pyplot.close(figure)


def draw_routing(out: Path, arms: Sequence[str], seed: int, names: dict[str, str], file: Path) -> None:
    """Heat maps of experts by specialty, of the last steps of each mixture from one seed."""
    matplotlib = require("matplotlib", "The heat map", "pip install -c constraints.txt matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot
    from routing_report import draw_experts, read

    colours = {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context({"font.size": 8, **colours}):
        figure, panels = pyplot.subplots(
            len(arms), 1, figsize=(7, 1.9 * len(arms)), layout="constrained", squeeze=False
        )  # fmt: skip
        for arm, panel in zip(arms, panels[:, 0], strict=True):
            draw_experts(panel, read(out / f"{arm}-{seed}.routing.jsonl", None, None, 200))
            panel.set_title(names[arm], loc="left", pad=16, fontsize=9)
        figure.savefig(file, dpi=110, transparent=True)
        pyplot.close(figure)


def run(args: argparse.Namespace) -> None:
    from specialisation_task import ARMS, settings

    import megamed.runtime  # noqa: F401  makes Megatron importable

    wanted, names = settings(args.steps, args.every), {key: arm.name for key, arm in ARMS.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.replot:
        train(args.out, args.arms, args.seeds, wanted, args.jobs)
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in args.arms:
        found = [finished(args.out, arm, seed, wanted) for seed in args.seeds]
        if None in found:
            raise UserError(f"{args.out}: has no result of {arm} from all seeds; run again without --replot")
        results[arm] = [result for result in found if result is not None]
    print(table(results, names, args.loss))
    for folder in filter(None, (args.out, args.docs)):
        draw(results, names, args.loss, folder / "specialisation.png")
        if mixtures := [arm for arm in args.arms if ARMS[arm].routing and ARMS[arm].in_pools]:
            draw_routing(args.out, mixtures, args.seeds[0], names, folder / "specialisation_routing.png")
        rounded = {arm: [{k: r[k] for k in ("seed", "curve")} for r in of_arm] for arm, of_arm in results.items()}
        write_text(folder / "specialisation.json", json.dumps({"settings": wanted, "arms": rounded}) + "\n")
    print(f"\nplots and curves: {args.out}")


if __name__ == "__main__":
    parsed = parse()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: models of this size are no work for a GPU
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(exit_code(lambda: run(parsed), "what is finished is kept; run the same command again to go on"))
