"""Put studies into a de-identified volume store, look at one, check one.

    python tools/ingest.py SOURCE... --out STORE        folders, DICOMDIR, zip and tar, NIfTI, pictures, reports
    python tools/ingest.py inspect STORE                what is in it, as a table and a contact sheet
    python tools/ingest.py verify STORE                 read every file and compare it with its sum
    python tools/ingest.py keywords [TEXT]              terms that are kept of descriptions; those that a text names

    python tools/ingest.py /data/pacs_export.zip --out stores/chest
    python tools/ingest.py /data/ct /data/reports.csv --out stores/ct --dates shift --workers 16
    python tools/ingest.py inspect stores/ct --sheet ct.png

Stopped at any moment, the same command goes on where it was. Nothing in STORE says who somebody is; what does, the
project's key and the table of refused files, lies in STORE.private. A source folder that is called inspect, verify
or keywords is given as ./inspect. Exit code: 0 if something was ingested or is there already, 2 for what you can mend,
130 after Ctrl-C.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamed.utils import UserError
from megamed.utils.command import positive

if TYPE_CHECKING:
    from megamed.data.ingest.options import Outcome
    from megamed.data.store import VolumeStore

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
EXIT_USER_ERROR, EXIT_DAMAGED, EXIT_INTERRUPTED = 2, 1, 128 + signal.SIGINT


def size(text: str) -> int:
    """`4G`, `500M`, or a number of bytes."""
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in UNITS else ""
    value = int(float(number.removesuffix(unit)) * UNITS[unit])
    return positive(str(value))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options. Sources need no word in front."""
    description: dict[str, Any] = {
        "description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter,
    }  # fmt: skip
    command = arguments[0] if arguments and arguments[0] in ("inspect", "verify", "keywords") else "ingest"
    if command == "ingest":
        parser = argparse.ArgumentParser(**description)
        parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder or file")
        parser.add_argument("--out", required=True, type=Path, metavar="STORE", help="the store; made where it is not")
        parser.add_argument("--workers", type=positive, help="processes (default: one a core)")
        parser.add_argument("--key", type=Path, metavar="FILE", help="project key (default: STORE.private/project.key)")
        parser.add_argument("--dates", choices=["drop", "shift"], default="drop",
                            help="drop them, or shift them by days that are one patient's own (default: drop)")
        parser.add_argument("--max-memory", type=size, metavar="SIZE",
                            help="that all series under way may take, like 8G (default: 70%% of the machine's)")
        parser.add_argument("--time-limit", type=positive, default=600, metavar="SECONDS",
                            help="for one series (default: 600)")
        parser.add_argument("--max-voxels", type=positive, default=4_000_000_000, metavar="N",
                            help="of one series (default: 4000000000)")
    elif command == "keywords":
        parser = argparse.ArgumentParser(prog="ingest.py keywords", **description)
        parser.add_argument("text", nargs="?", metavar="TEXT", help="a description; without one, the whole list")
    else:
        parser = argparse.ArgumentParser(prog=f"ingest.py {command}", **description)
        parser.add_argument("store", type=Path, metavar="STORE")
        if command == "inspect":
            parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet")
            parser.add_argument("--series", action="store_true", help="one line a series")
    args = parser.parse_args(arguments if command == "ingest" else arguments[1:])
    args.command = command
    return args


def ingest(args: argparse.Namespace) -> int:
    """Ingest, and print what came of it."""
    from megamed.data.ingest.engine import run
    from megamed.data.ingest.options import Limits

    limits = Limits(seconds=args.time_limit, num_bytes=args.max_memory, num_voxels=args.max_voxels)
    outcome = run(args.sources, args.out, workers=args.workers, key=args.key, dates=args.dates, limits=limits)
    print(summary(outcome, args.out))
    return 0


def summary(outcome: "Outcome", store: Path) -> str:
    """What an ingest did, in numbers."""
    slices = f"{outcome.frames:,} slices, {outcome.num_bytes / 2**20:,.1f} MiB"
    kinds = outcome.kinds
    aside = f"{kinds.get('hidden', 0):,} hidden files and {kinds.get('sidecar', 0):,} sidecars passed over"
    lines = [
        f"{outcome.files:,} files in {outcome.seconds:,.1f} s: {outcome.new_series:,} series new, "
        f"{outcome.known_series:,} were there; {aside}",
        f"{store} has {outcome.studies:,} studies, {outcome.series:,} series, {slices}, {outcome.samples:,} samples",
    ]
    if outcome.refused:
        count = sum(outcome.refused.values())
        lines.append(f"{count:,} files and reports refused, each with the reason in {outcome.quarantine}:")
        lines += [f"  {count:>9,}  {code}" for code, count in outcome.refused.items()]
    return "\n".join(lines)


def run_command(args: argparse.Namespace) -> int:
    """The command's exit code.

    Raises:
        UserError: something that the user can mend.
    """
    if args.command == "ingest":
        return ingest(args)
    if args.command == "keywords":
        return keywords(args.text)
    from megamed.data.store import VolumeStore

    store = VolumeStore(args.store)
    return inspect(store, args) if args.command == "inspect" else verify(store)


def keywords(text: str | None) -> int:
    """Print the list of terms, or those that a text names."""
    from megamed.data.keywords import find_keywords, listing

    print(listing() if text is None else "\n".join(find_keywords([text])) or "none")
    return 0


def inspect(store: "VolumeStore", args: argparse.Namespace) -> int:
    """Print what a store has, and draw it."""
    from megamed.data.store.inspect import contact_sheet, describe

    print(describe(store, args.series))
    if args.sheet:
        try:
            count = contact_sheet(store, args.sheet)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{args.sheet}: cannot be written ({reason}); give another file") from error
        print(f"{args.sheet} shows {count:,} series")
    return 0


def verify(store: "VolumeStore") -> int:
    """Check every file of a store; print what is wrong."""
    from megamed.data.ingest.progress import Progress

    with Progress("verify", "series", len(store), shown=True) as bar:
        faults = store.verify(lambda num_bytes, num_series: bar.add())
    for fault in faults:
        print(f"{fault.reason}; {fault.mend}")
    print(f"{len(store):,} series, {len(faults):,} faults")
    return EXIT_DAMAGED if faults else 0


def main() -> int:
    """Run; every way out has its exit code, and one line."""
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, _end)
    try:
        return run_command(args)
    except UserError as error:
        print(f"megamed: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\nmegamed: interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the table has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DAMAGED


def _end(signal_number: int, frame: Any) -> None:
    """End as after Ctrl-C, with the exit code of this signal."""
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    sys.exit(main())
