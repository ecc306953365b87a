"""Check files of samples before training: every fault with file, line, key and mend.

    python tools/validate_samples.py FILE... [--store STORE] [--pools conf/model/moe/specialists.yaml]

Ends with code 0 where all is well, 1 where something has to be mended, 2 where a file cannot be read. What the lines
say is never shown, neither text nor paths.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml
from tqdm import tqdm

from megamed.data.frames.windows import WINDOWS
from megamed.data.samples.validate import validate
from megamed.data.specialties import GENERAL, Specialties, Specialty
from megamed.data.store import VolumeStore
from megamed.utils import UserError


def read_pools(path: Path) -> Specialties:
    """The pools of a configuration: of a run's config.yaml, or of a file of conf/model/moe.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        values = yaml.safe_load(path.read_text())
        moe = values["model"]["language"]["moe"] if "model" in values else values
        pools = {name: tuple(map(str, (pool or {}).get("labels") or ())) for name, pool in moe["pools"].items()}
        if not pools or any(isinstance((pool or {}).get("labels"), str) for pool in moe["pools"].values()):
            raise TypeError
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a run's config.yaml") from error
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: names no pools of experts (model.language.moe.pools)") from error
    return Specialties([Specialty(name, labels=labels) for name, labels in pools.items() if name != GENERAL])


def check(path: Path, store: VolumeStore | None, specialties: Specialties | None) -> int:
    """Print what is wrong with one file, and return how many faults there are."""
    num_problems, num_lines = 0, 0
    size = path.stat().st_size if path.is_file() else 0
    # A bar for a person; a log has no use for it.
    with tqdm(total=size, unit="B", unit_scale=True, desc="validate", disable=not sys.stderr.isatty()) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal num_lines
            num_lines += 1
            bar.update(num_bytes)

        for problem in validate(path, store, frozenset(WINDOWS), specialties, advance):
            num_problems += 1
            tqdm.write(f"{path}:{problem.line}: {problem}" if problem.line else f"{path}: {problem}")
    print(f"{path}: {num_lines:,} lines, {num_problems:,} problems")
    return num_problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON Lines, a sample each")
    parser.add_argument("--store", type=Path, help="the volume store that the samples' studies are in")
    parser.add_argument("--pools", type=Path, metavar="YAML", help="a configuration whose pools the samples may call")
    options = parser.parse_args()
    specialties = None if options.pools is None else read_pools(options.pools)
    store = None if options.store is None else VolumeStore(options.store)
    num_problems = sum([check(path, store, specialties) for path in options.files])
    return 1 if num_problems else 0


if __name__ == "__main__":
    try:
        code = main()
    except UserError as error:
        print(f"validate_samples: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code)
