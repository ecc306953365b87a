"""What command-line tools share: argument types, and starting ranks."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megamed.utils.errors import UserError


def positive(text: str) -> int:
    """A whole number from 1 on, as an argument of a command line."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def exit_code(run: Callable[[], None], interrupted: str) -> int:
    """Run what a tool is for; a failure that the user can mend, and Ctrl-C, end it with one line.

    Args:
        run: what to do.
        interrupted: what to say after Ctrl-C.

    Returns:
        0, 2 or 130.
    """
    try:
        run()
    except UserError as error:
        print(f"megamed: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmegamed: interrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0


def run_ranks(
    script: Path,
    num_ranks: int,
    arguments: Sequence[str],
    python_options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a script in processes of its own, under torchrun where there are several, and wait for them.

    Args:
        script: what each rank runs.
        num_ranks: processes.
        arguments: of the script.
        python_options: of the interpreter.
        environment: variables that are set unless they are set already.

    Returns:
        The exit code. What the processes say is on the screen.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    launcher = [sys.executable, *python_options, *(torchrun if num_ranks > 1 else [])]
    # One thread a process, also where there is one process: those that are compared share the same cores.
    variables = {"OMP_NUM_THREADS": "1", **(environment or {}), **os.environ}
    with subprocess.Popen([*launcher, str(script), *arguments], env=variables) as process:
        try:
            return process.wait()
        except BaseException:  # torchrun ends its ranks when it is asked to end
            process.terminate()
            raise
