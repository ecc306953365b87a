"""Whether runs are alive, how far they are, and what happened to them.

    python tools/status.py runs/internvl26b
    python tools/status.py runs/*            # a line each
    python tools/status.py runs/NAME --json

Reads the files of a run's folder alone, so it works while the run goes on, on any machine that sees the folder, and
without a GPU. Exit code: 0 if all of them train or are complete, 1 if one has ended before its last step, 2 for what
you can mend.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from megamed.utils import UserError
from megamed.utils.command import exit_code

# A rank says every 10 seconds that it lives; a machine that is busy, or a slow file system, may be late.
SILENT_SECONDS = 60.0
# Throughput is the median of so many steps.
_LAST_STEPS = 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print JSON, an object for each run")
    return parser.parse_args()


def status(run: Path, now: float) -> dict[str, Any]:
    """What the files of a run say.

    Args:
        run: its folder.
        now: seconds since 1970.

    Raises:
        UserError: it is no run's folder.
    """
    config = _yaml(run / "config.yaml")
    alive, steps, starts = _json(run / "alive.json"), _lines(run / "metrics.jsonl"), _lines(run / "starts.jsonl")
    state = alive.get("state", "unknown")
    silent = now - alive.get("time", 0.0)
    if state in ("starting", "training", "ending") and silent > SILENT_SECONDS:
        state = "dead"
    last = steps[-1] if steps else {}
    recent = [line["tokens_per_s"] for line in steps[-_LAST_STEPS:] if "tokens_per_s" in line]
    compared = _lines(run / "stragglers.jsonl")
    saved = sorted((run / "checkpoints").glob("step_????????"))
    return {
        "run": str(run),
        "state": state,
        "silent_seconds": round(silent, 1) if alive else None,
        "step": last.get("step", 0),
        "steps": config["train"]["steps"],
        "loss": last.get("loss"),
        "tokens_per_second": statistics.median(recent) if recent else None,
        "mfu": last.get("mfu"),
        "checkpoint": saved[-1].name if saved else None,
        "checkpoint_age_seconds": round(now - saved[-1].stat().st_mtime, 1) if saved else None,
        "damaged_checkpoints": [path.name for path in sorted((run / "checkpoints").glob("*.damaged"))],
        "starts": len(starts),
        "ranks": starts[-1]["world_size"] if starts else None,
        "hangs": len(list((run / "hangs").glob("*.txt"))),
        "slow_ranks": compared[-1]["slow"] if compared else [],
    }


def table(found: list[dict[str, Any]]) -> str:
    """A line for each run."""
    lines = [("run", "state", "step", "loss", "tokens/s", "MFU", "last checkpoint", "starts", "notes")]
    for x in found:
        speed = f"{x['tokens_per_second']:,.0f}" if x["tokens_per_second"] is not None else "-"
        saved = f"{x['checkpoint']}, {_ago(x['checkpoint_age_seconds'])} ago" if x["checkpoint"] else "none"
        state = f"{x['state']} ({_ago(x['silent_seconds'])} silent)" if x["state"] == "dead" else x["state"]
        notes = [f"damaged: {', '.join(x['damaged_checkpoints'])}"] if x["damaged_checkpoints"] else []
        notes += [f"{x['hangs']} ranks hung: see hangs/"] if x["hangs"] else []
        notes += [f"rank {slow['rank']} on {slow['node']} {slow['what']}" for slow in x["slow_ranks"]]
        lines.append((
            Path(x["run"]).name, state, f"{x['step']}/{x['steps']}", "-" if x["loss"] is None else f"{x['loss']:.4f}",
            speed, "-" if x["mfu"] is None else f"{100 * x['mfu']:.1f}%", saved, str(x["starts"]), "; ".join(notes),
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
        int(values["train"]["steps"])
    except OSError as error:
        raise UserError(f"{path.parent}: is no run's folder ({path.name}: {error.strerror})") from error
    except (yaml.YAMLError, TypeError, LookupError, ValueError) as error:
        raise UserError(f"{path}: is no configuration of a run") from error
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines; the last one may be half-written."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError):
        return []


def main() -> int:
    args = parse()
    codes: list[int] = []

    def run() -> None:
        found = [status(run, time.time()) for run in args.runs]
        print("\n".join(map(json.dumps, found)) if args.json else table(found))
        codes.append(int(any(x["state"] not in ("starting", "training", "ending", "complete") for x in found)))

    return exit_code(run, "nothing was done") or codes[0]


if __name__ == "__main__":
    sys.exit(main())
