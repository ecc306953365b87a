"""The combinations of a sweep: each value that is several, separated by commas, is tried with all values of the others.

    python tools/sweep.py +exp=fmri optim.lr=1e-3,3e-4 train.seed=1,2            # all, by number
    python tools/sweep.py --index 3 +exp=fmri optim.lr=1e-3,3e-4 train.seed=1,2  # one, a setting a line

`slurm/sweep.sh` makes a job array of them. Commas within brackets or quotes separate nothing. Each combination has a
name of its own, `run.name`, which ends in its number.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

from megamed.utils import UserError
from megamed.utils.command import exit_code


def split(text: str) -> list[str]:
    """The values that a setting has, split at commas outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and not depth:
            values.append("")
            continue
        values[-1] += letter
    return values


def combinations(settings: Sequence[str]) -> list[list[str]]:
    """The settings of each job.

    Raises:
        UserError: a setting is none.
    """
    choices, name = [], None
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"{setting}: is no setting; write key=value, or key=value,value")
        if key == "run.name":
            name = text
        else:
            choices.append([f"{key}={value}" for value in split(text)])
    found = [list(chosen) for chosen in itertools.product(*choices)]
    return [[*chosen, f"run.name={name or 'sweep'}-{number}"] for number, chosen in enumerate(found)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="key=value[,value]", help="as for launch/pretrain.py")
    parser.add_argument("--index", type=int, metavar="N", help="print one combination, a setting a line")
    args, unknown = parser.parse_known_args()

    def run() -> None:
        found = combinations([*args.settings, *unknown])
        if args.index is None:
            for number, chosen in enumerate(found):
                print(number, *chosen)
        elif not 0 <= args.index < len(found):
            last = len(found) - 1
            raise UserError(f"--index {args.index}: there are {len(found)} combinations; take --array=0-{last}")
        else:
            print("\n".join(found[args.index]))

    return exit_code(run, "nothing was done")


if __name__ == "__main__":
    sys.exit(main())
