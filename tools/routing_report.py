"""Which specialty used which experts: what a run's routing.jsonl says, as tables and as a heat map.

    python tools/routing_report.py runs/ct
    python tools/routing_report.py runs/ct --last 2000 --png routing.png
    python tools/routing_report.py runs/ct --from 1 --to 500 --no-png --json routing.json

RUN is the folder of a run, or a routing.jsonl. The file has windows of steps; those that overlap with the steps that
are asked for are summed. A choice is one of the top-k experts of one token in one layer; a load is choices relative
to a mean, so 1 is even. Unless --png says where, the heat map is routing.png beside the file.

Shapes: L layers with experts, R rows (specialties, tokens without any, all tokens), E experts.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megamed.models.moe import Pools
from megamed.models.moe.report import ALL, NONE, expert_loads, match_counts, pool_shares, rank_loads, row_names
from megamed.utils import UserError
from megamed.utils.command import positive
from megamed.utils.files import write_text
from megamed.utils.optional import require

FILE = "routing.jsonl"
LAST_STEPS = 500
ENDS = ("busiest", "idlest")
ROW_LABELS = {NONE: "(none)", ALL: "(all tokens)"}


@dataclass(frozen=True)
class Routing:
    """The routing of some steps.

    Attributes:
        first, last: the steps.
        num_windows: of the file.
        layers: numbers of the layers with experts.
        pools: the pools of each of them.
        expert_parallel: ranks that shared the experts of a layer, in the last window.
        picks_LRE: choices.
        entropy_L: of the router's distribution over experts, nats, mean over tokens.
    """

    first: int
    last: int
    num_windows: int
    layers: tuple[int, ...]
    pools: Pools
    expert_parallel: int
    picks_LRE: np.ndarray
    entropy_L: np.ndarray

    @property
    def rows(self) -> tuple[str, ...]:
        return row_names(self.pools)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help=f"folder of a run, or a {FILE}")
    parser.add_argument("--last", type=positive, metavar="STEPS", help=f"steps up to the last (default: {LAST_STEPS})")
    parser.add_argument("--from", type=positive, dest="first", metavar="STEP", help="first step")
    parser.add_argument("--to", type=positive, dest="to", metavar="STEP", help="last step")
    parser.add_argument("--ranks", type=positive, metavar="N", help="expert-parallel ranks (default: the run's)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the heat map (default: routing.png beside the file)")
    parser.add_argument("--no-png", action="store_true", help="tables alone, which needs no matplotlib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of the tables")
    args = parser.parse_args()
    if args.last and (args.first or args.to):
        parser.error("--last does not go with --from and --to")
    if args.first and args.to and args.first > args.to:
        parser.error(f"--from {args.first} is after --to {args.to}")
    return args


def on_ranks(routing: Routing, num_ranks: int) -> Routing:
    """The same choices, had so many expert-parallel ranks shared the experts.

    Raises:
        UserError: they cannot.
    """
    for name, size in routing.pools.sizes.items():
        if size % num_ranks:
            raise UserError(f"--ranks {num_ranks} does not divide the {size} experts of pool {name}")
    return replace(routing, expert_parallel=num_ranks)


def find(run: Path) -> Path:
    """The routing.jsonl of a run.

    Raises:
        UserError: there is none; says why.
    """
    if not run.exists():
        raise UserError(f"{run}: there is no such run; give its folder (run.dir/run.name) or its {FILE}")
    if run.is_file():
        return run
    path = run / FILE
    if path.is_file():
        return path
    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run}: is no folder of a run (it has neither {FILE} nor config.yaml)")
    moe = yaml.safe_load(config.read_text())["model"]["language"]["moe"]
    if not moe.get("pools") and not moe.get("num_experts"):
        raise UserError(f"{run}: the model of this run is dense, so nothing was routed")
    raise UserError(f"{run}: has no {FILE}; the run was made without it, or has not begun")


def read(path: Path, first: int | None, to: int | None, last: int | None) -> Routing:
    """Sum the windows that overlap with some steps.

    Args:
        path: a routing.jsonl.
        first, to: the steps; None for no bound.
        last: instead, how many steps up to the last one.

    Raises:
        UserError: a line is damaged, there is no window in these steps, or the experts are not the same in all.
    """
    end = _last_step(path)
    if last:
        first = max(end - last + 1, 1)
    total: Routing | None = None
    for window in windows(path):
        if (first is None or window.last >= first) and (to is None or window.first <= to):
            total = window if total is None else _join(path, total, window)
    if not end:
        raise UserError(f"{path}: has no window of steps yet; one ends every model.language.moe.log_every steps")
    if total is None:
        asked = f"steps {first or 1:,} to {to or end:,}"
        raise UserError(f"{path}: has no window in {asked}; its last step is {end:,}")
    return total


def windows(path: Path) -> Iterator[Routing]:
    """The windows of a file. A last line without its end is still being written, or was cut by a kill, and is left out.

    Raises:
        UserError: another line is damaged.
    """
    with open(path, errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                print(f"routing_report: line {number} of {path} has no end yet and is left out", file=sys.stderr)
                return
            try:
                yield _window(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}: line {number} is damaged ({error}); remove it, and its steps are left out"
                ) from error


def _window(line: dict[str, Any]) -> Routing:
    pools, layers = Pools(line["pools"]), tuple(line["layers"])
    picks_LRE, entropy_L = np.array(line["picks"], np.int64), np.array(line["entropy"], float)
    wanted = (len(layers), len(row_names(pools)), pools.num_experts)
    if tuple(line["rows"]) != row_names(pools):
        raise ValueError(f"its rows are not {', '.join(row_names(pools))}")
    if picks_LRE.shape != wanted or entropy_L.shape != wanted[:1] or pools.num_experts % line["expert_parallel"]:
        raise ValueError("its sizes do not fit each other")
    first = line["step"] - line["steps"] + 1
    return Routing(first, line["step"], 1, layers, pools, line["expert_parallel"], picks_LRE, entropy_L)


def _join(path: Path, one: Routing, other: Routing) -> Routing:
    if (dict(one.pools.sizes), one.layers) != (dict(other.pools.sizes), other.layers):
        raise UserError(
            f"{path}: the experts changed between steps {one.last:,} ({_outline(one)}) and {other.first:,} "
            f"({_outline(other)}); ask for steps on one side, with --from {other.first} or --to {one.last}"
        )
    weights = [routing.picks_LRE[:, -1].sum(1) for routing in (one, other)]
    entropy_L = (one.entropy_L * weights[0] + other.entropy_L * weights[1]) / np.maximum(sum(weights), 1)
    return Routing(
        one.first, other.last, one.num_windows + 1, one.layers, one.pools, other.expert_parallel,
        one.picks_LRE + other.picks_LRE, entropy_L,
    )  # fmt: skip


def _outline(routing: Routing) -> str:
    pools = ", ".join(f"{name} {size}" for name, size in routing.pools.sizes.items())
    return f"{pools} in {len(routing.layers)} layers"


def _last_step(path: Path) -> int:
    """Number of the last step of a file, 0 for none; damaged lines are for `windows` to name."""
    step = 0
    with open(path, errors="replace") as lines:
        for line in lines:
            if not line.endswith("\n"):
                break
            with contextlib.suppress(ValueError, LookupError, TypeError):
                # `step` stands first, and the rest of a line can be long.
                step = max(step, int(json.loads(line.partition(",")[0] + "}")["step"]))
    return step


def numbers(routing: Routing) -> dict[str, Any]:
    """What the tables show, by name, for --json."""
    pools, picks_LRE = routing.pools, routing.picks_LRE
    shares_RQ, shares_LRQ = pool_shares(picks_LRE.sum(0), pools), pool_shares(picks_LRE, pools)
    loads_LE, loads_LN = expert_loads(picks_LRE[:, -1], pools), rank_loads(picks_LRE[:, -1], routing.expert_parallel)
    rows = {
        name: {
            "choices": int(picks_LRE[:, row].sum()),
            "shares": dict(zip(pools.names, shares_RQ[row].round(6).tolist(), strict=True)),
            "by_expert": (picks_LRE[:, row].sum(0) / max(picks_LRE[:, row].sum(), 1)).round(6).tolist(),
        }
        for row, name in enumerate(routing.rows)
    }
    own = {name: shares_LRQ[:, row, pools.names.index(name)] for row, name in enumerate(pools.specialties)}
    of_pools_L, of_all_L = match_counts(picks_LRE, pools)
    layers = [
        {
            "layer": layer,
            "entropy": round(float(routing.entropy_L[place]), 6),
            "busiest_rank": int(loads_LN[place].argmax()),
            "load": round(float(loads_LN[place].max()), 6),
            "match": round(float(of_pools_L[place] / of_all_L[place]), 6) if of_all_L[place] else None,
            "own_pool": {name: round(float(shares_L[place]), 6) for name, shares_L in own.items()},
        }
        for place, layer in enumerate(routing.layers)
    ]
    return {
        "steps": [routing.first, routing.last],
        "windows": routing.num_windows,
        "expert_parallel": routing.expert_parallel,
        "experts": [f"{name} {number}" for name, number in pools.order],
        "rows": rows,
        "pools": {name: _pool(routing, name, loads_LE) for name in pools.names},
        "layers": layers,
        "one_specialty": _one_specialty(routing),
    }


def _one_specialty(routing: Routing) -> dict[str, dict[str, float]]:
    """Load of the busiest rank in a batch of one specialty alone, mean over layers: as experts are numbered, and were
    pools numbered one after the other."""
    pools, by_pool = routing.pools, [number for name in routing.pools.names for number in routing.pools.members[name]]
    loads: dict[str, dict[str, float]] = {}
    for row, name in enumerate(pools.specialties):
        picks_LE = routing.picks_LRE[:, row]
        if picks_LE.any():
            both = (rank_loads(order, routing.expert_parallel) for order in (picks_LE, picks_LE[:, by_pool]))
            spread, together = (round(float(loads_LN.max(1).mean()), 6) for loads_LN in both)
            loads[name] = {"spread": spread, "together": together}
    return loads


def _pool(routing: Routing, name: str, loads_LE: np.ndarray) -> dict[str, Any]:
    """Size, share, busiest and idlest expert (over all layers), entropy of the choices within the pool."""
    members = routing.pools.members[name]
    picks_LM = routing.picks_LRE[:, -1][:, members]
    shares_LM = picks_LM / np.maximum(picks_LM.sum(1, keepdims=True), 1)
    entropy_L = -(shares_LM * np.log(np.maximum(shares_LM, 1e-300))).sum(1)
    loads_LM = loads_LE[:, members]

    def one(place: int) -> dict[str, Any]:
        row, expert = divmod(place, len(members))
        return {"expert": expert, "layer": routing.layers[row], "load": round(float(loads_LM[row, expert]), 6)}

    return {
        "experts": len(members),
        "choices": int(picks_LM.sum()),
        "busiest": one(int(loads_LM.argmax())),
        "idlest": one(int(loads_LM.argmin())),
        "entropy": round(float(entropy_L.mean()), 6),
        "most_entropy": round(math.log(len(members)), 6),
    }


def tables(routing: Routing) -> str:
    """The report as text."""
    facts, pools = numbers(routing), routing.pools
    shares = [["specialty", *pools.names, "choices"]]
    for name, row in facts["rows"].items():
        cells = [f"{share:.1%}" for share in row["shares"].values()] if row["choices"] else ["-"] * len(pools.names)
        shares.append([ROW_LABELS.get(name, name), *cells, f"{row['choices']:,}"])
    within = [["pool", "experts", "busiest", "idlest", "entropy, of at most"]]
    for name, pool in facts["pools"].items():
        ends = [f"{e['load']:.2f} (expert {e['expert']}, layer {e['layer']})" for e in map(pool.get, ENDS)]
        used = [*ends, f"{pool['entropy']:.2f} of {pool['most_entropy']:.2f}"]
        within.append([name, str(pool["experts"]), *(used if pool["choices"] else ["not used", "", ""])])
    plural = "s" if routing.num_windows > 1 else ""
    ranks = f", on {routing.expert_parallel} expert-parallel ranks" if routing.expert_parallel > 1 else ""
    alone = [["a batch of", "busiest rank", "were each pool on its own ranks"]]
    alone += [[name, f"{x['spread']:.2f}", f"{x['together']:.2f}"] for name, x in facts["one_specialty"].items()]
    of_ranks = ["", "Load of the busiest rank in a batch of one specialty alone, mean over layers", *_aligned(alone)]
    return "\n".join(
        [
            f"steps {routing.first:,} to {routing.last:,} ({routing.num_windows} window{plural})",
            f"experts of each layer: {_outline(routing)}{ranks}",
            "",
            "Where the tokens of each specialty were sent, by pool of experts",
            *_aligned(shares),
            "",
            "Load of the experts within their pool, in the layer where it is largest and smallest",
            *_aligned(within),
            "",
            "Layers (matched: choices of the tokens with specialties that went to pools of theirs)",
            *_aligned(_by_layer(facts)),
            *(of_ranks if routing.expert_parallel > 1 and facts["one_specialty"] else []),
        ]
    )


def _by_layer(facts: dict[str, Any]) -> list[list[str]]:
    layers, rows = facts["layers"], [["layer", "router's entropy", "matched", "load of the busiest rank"]]
    for x in layers:
        match = "-" if x["match"] is None else f"{x['match']:.1%}"
        rows.append([str(x["layer"]), f"{x['entropy']:.2f}", match, f"{x['load']:.2f} (rank {x['busiest_rank']})"])
    matches = [x["match"] for x in layers if x["match"] is not None]
    entropies, loads = zip(*[(x["entropy"], x["load"]) for x in layers], strict=True)
    means = [f"{np.mean(entropies):.2f}", f"{np.mean(matches):.1%}" if matches else "-", f"{np.mean(loads):.2f}"]
    rows += [["mean", *means], ["worst", "", f"{min(matches):.1%}" if matches else "-", f"{max(loads):.2f}"]]
    return rows if facts["expert_parallel"] > 1 else [row[:-1] for row in rows]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns side by side: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def draw(routing: Routing, out: Path) -> None:
    """Draw specialty x expert, a mean over layers, and specialty x layer: the share that matches.

    Args:
        routing: what to draw.
        out: the file, whose suffix says the format.

    Raises:
        UserError: matplotlib is missing, or does not know the format.
    """
    matplotlib = require("matplotlib", "The heat map", "pip install -c constraints.txt matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    used = _used_rows(routing)
    specialties = [row for row in used if row < len(routing.pools.specialties)]
    heights = [0.30 * len(used) + 1.3, *([0.30 * len(specialties) + 1.0] if specialties else [])]
    width = min(max(7.0, 2.2 + 0.075 * routing.pools.num_experts), 17.0)
    with matplotlib.rc_context({"font.size": 8}):
        figure, panels = pyplot.subplots(
            len(heights), 1, figsize=(width, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
        )
        draw_experts(panels[0, 0], routing)
        if specialties:
            _draw_match(panels[1, 0], routing, specialties)
        unfinished = out.with_name(f".{out.stem}.part{out.suffix}")
        try:
            figure.savefig(unfinished, dpi=110)
            os.replace(unfinished, out)
        except ValueError as error:
            raise UserError(f"--png {out}: {str(error).splitlines()[0]}") from error
        finally:
            pyplot.close(figure)


def _used_rows(routing: Routing) -> list[int]:
    return [row for row in range(len(routing.rows)) if routing.picks_LRE[:, row].any()]


def draw_experts(panel: Any, routing: Routing) -> None:
    """Draw the share of each specialty's choices that went to each expert, experts by pool.

    Args:
        panel: matplotlib's axes, of a figure.
        routing: what to draw.
    """
    used = _used_rows(routing)
    pools = routing.pools
    order = [number for name in pools.names for number in pools.members[name]]
    picks_RE = routing.picks_LRE.sum(0)[used][:, order]
    shares_RE = picks_RE / picks_RE.sum(1, keepdims=True)
    _image(panel, shares_RE, max(shares_RE.max(), 1e-9), "share of the choices")
    _name_rows(panel, routing, used)
    cell = panel.get_figure().get_figwidth() * 0.75 / len(order)  # inches, about
    places = [i for name in pools.names for i in range(pools.sizes[name])]
    panel.set_xticks(range(len(order)), places if cell > 0.11 else [""] * len(order), fontsize=6)
    panel.tick_params(axis="x", length=0)
    panel.set_xlabel("experts of each pool, mean over layers" if len(routing.layers) > 1 else "experts of each pool")
    left = 0
    for name, size in pools.sizes.items():
        if left:
            panel.axvline(left - 0.5, color="black", linewidth=1)
        fits = 0.07 * len(name) < cell * size
        turned = {} if fits else {"rotation": 60, "rotation_mode": "anchor", "ha": "left"}
        panel.text(left + (size - 1) / 2, -0.65, name, **{"ha": "center", "va": "bottom", **turned})
        left += size
    if len(order) <= 16:
        _write_shares(panel, shares_RE)


def _draw_match(panel: Any, routing: Routing, specialties: list[int]) -> None:
    """Share of each specialty's choices that went to its own pool, by layer."""
    shares_LRQ = pool_shares(routing.picks_LRE, routing.pools)
    own = [routing.pools.names.index(routing.rows[row]) for row in specialties]
    match_RL = np.stack([shares_LRQ[:, row, pool] for row, pool in zip(specialties, own, strict=True)])
    _image(panel, match_RL, 1.0, "share to its own pool")
    _name_rows(panel, routing, specialties)
    step = -(-len(routing.layers) // 32)
    panel.set_xticks(range(0, len(routing.layers), step), routing.layers[::step])
    panel.set_xlabel("layer")
    if len(routing.layers) <= 16:
        _write_shares(panel, match_RL)


def _image(panel: Any, values: np.ndarray, most: float, label: str) -> None:
    image = panel.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=most)
    digits = 1 if most < 0.1 else 0
    bar = panel.get_figure().colorbar(image, ax=panel, fraction=0.04, pad=0.02, format=lambda x, _: f"{x:.{digits}%}")
    bar.set_label(label, fontsize=7)


def _name_rows(panel: Any, routing: Routing, rows: list[int]) -> None:
    panel.set_yticks(range(len(rows)), [ROW_LABELS.get(routing.rows[row], routing.rows[row]) for row in rows])
    num_named = sum(row < len(routing.pools.specialties) for row in rows)
    if 0 < num_named < len(rows):
        panel.axhline(num_named - 0.5, color="black", linewidth=1)


def _write_shares(panel: Any, shares: np.ndarray) -> None:
    middle = panel.images[0].norm.vmax * 0.6
    for (y, x), share in np.ndenumerate(shares):
        colour = "black" if share > middle else "white"
        panel.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)


def main(args: argparse.Namespace) -> None:
    path = find(args.run)
    last = args.last if args.last or args.first or args.to else LAST_STEPS
    routing = read(path, args.first, args.to, last)
    routing = on_ranks(routing, args.ranks or routing.expert_parallel)
    text = tables(routing)
    try:
        if args.json:
            write_text(args.json, json.dumps(numbers(routing), indent=1) + "\n")
        if not args.no_png:
            png = args.png or path.with_name("routing.png")
            draw(routing, png)
            text += f"\n\nheat map  {png}"
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error
    print(text)


if __name__ == "__main__":
    parsed = parse()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    try:
        main(parsed)
    except UserError as error:
        sys.exit(f"routing_report: {error}")
