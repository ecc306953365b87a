"""Check files of samples before training: every fault with file, line, key and mend.

    python tools/validate_samples.py FILE... [--store STORE]

Ends with code 0 where all is well, 1 where something has to be mended, 2 where a file cannot be read. What the lines
say is never shown, neither text nor paths.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from megamed.data.frames.windows import WINDOWS
from megamed.data.samples.validate import validate
from megamed.data.store import VolumeStore
from megamed.utils import UserError


def check(path: Path, store: VolumeStore | None) -> int:
    """Print what is wrong with one file, and return how many faults there are."""
    num_problems, num_lines = 0, 0
    size = path.stat().st_size if path.is_file() else 0
    # A bar for a person; a log has no use for it.
    with tqdm(total=size, unit="B", unit_scale=True, desc="validate", disable=not sys.stderr.isatty()) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal num_lines
            num_lines += 1
            bar.update(num_bytes)

        for problem in validate(path, store, frozenset(WINDOWS), advance):
            num_problems += 1
            tqdm.write(f"{path}:{problem.line}: {problem}" if problem.line else f"{path}: {problem}")
    print(f"{path}: {num_lines:,} lines, {num_problems:,} problems")
    return num_problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON Lines, a sample each")
    parser.add_argument("--store", type=Path, help="the volume store that the samples' studies are in")
    options = parser.parse_args()
    store = None if options.store is None else VolumeStore(options.store)
    num_problems = sum([check(path, store) for path in options.files])
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
