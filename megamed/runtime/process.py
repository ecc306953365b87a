"""Start-up and shutdown of one rank's process.

A program's `main` runs inside `run`, which owns the way out: a `UserError` becomes one line and exit
code 2, any other exception a traceback and exit code 1, and in both cases the process ends at once,
without waiting for collectives that the other ranks will never join. torchrun then ends those.
"""

import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from megamed.runtime.device import device_type, set_device
from megamed.utils import UserError

EXIT_USER_ERROR = 2

# A rank that loses its peer fails a moment after the rank that had the error. It waits this long before
# it speaks, so that torchrun ends it first and the screen shows the cause, not the consequences.
_CONSEQUENCE_DELAY_S = 10.0
_CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted")


def global_rank() -> int:
    """This process's rank as torchrun set it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes as torchrun set it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(timeout_minutes: float = 30.0) -> None:
    """Join the job's default process group: NCCL where there is a GPU, gloo elsewhere.

    Without torchrun the process is a job of its own, and opens no port.

    Raises:
        UserError: the rendezvous failed, for instance because the port is in use.
    """
    device = set_device()
    backend = "nccl" if device_type() == "cuda" else "gloo"
    options: dict = {"timeout": datetime.timedelta(minutes=timeout_minutes)}
    if device.type == "cuda":
        options["device_id"] = device
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        return
    try:
        dist.init_process_group(backend, **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"cannot meet the other ranks at {where} ({_first_line(error)}); if the port is in use, "
            "start torchrun with --standalone or another --master-port"
        ) from error


def stop() -> None:
    """Leave the default process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end the process with its exit code.

    Args:
        main: the program; returns an exit code, None for 0.
    """
    try:
        code = main() or 0
    except UserError as error:
        code = EXIT_USER_ERROR
        _report_user_error(error)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        code = 1
        _report_defect(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    stop()
    sys.exit(0)


def _report_user_error(error: UserError) -> None:
    rank = global_rank()
    _tell_torchrun(str(error))
    if rank == 0 or not error.everywhere:
        who = "" if world_size() == 1 or error.everywhere else f" [rank {rank}]"
        print(f"megamed: error{who}: {error}", file=sys.stderr, flush=True)


def _report_defect(error: BaseException) -> None:
    if any(sign in str(error) for sign in _CONSEQUENCES):
        time.sleep(_CONSEQUENCE_DELAY_S)
    _tell_torchrun(f"{type(error).__name__}: {_first_line(error)}")
    print(f"megamed: rank {global_rank()} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for it, so that its closing report names the cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        reply = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with open(path, "w") as file:
            json.dump(reply, file)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
