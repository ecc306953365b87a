"""Start-up and shutdown of one rank's process.

A program's `main` runs inside `run`, which owns the way out: a `UserError` becomes one line and exit
code 2, any other exception a traceback and exit code 1, Ctrl-C one line and exit code 130. In each case
the process ends at once, without waiting for collectives that the other ranks will never join. torchrun
then ends those.
"""

import contextlib
import datetime
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

from megamed.runtime.device import device_type, set_device
from megamed.runtime.rendezvous import fresh_store
from megamed.utils import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT

# When one rank fails, torchrun ends the others a moment later. Ranks that would only repeat what another
# says wait for that: so the screen shows the cause, once. One that nobody ends speaks after all.
_SAME_ERROR_DELAY_S = 4.0
_CONSEQUENCE_DELAY_S = 10.0
# How a rank learns that its peer is gone.
_CONSEQUENCES = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe",
                 "NCCL communicator was aborted")


def global_rank() -> int:
    """This process's rank as torchrun set it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes as torchrun set it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node() -> int:
    """Processes of this job on one machine as torchrun set it; the world size without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


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
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=options["timeout"]))
        store.set_timeout(options["timeout"])
        store = fresh_store(store, rank, size, 60 * timeout_minutes)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"cannot meet the other ranks at {where} ({_first_line(error)}); if another program has the port, "
            "start torchrun without --master-port, or with another one"
        ) from error
    except ValueError as error:  # a variable of the environment is missing
        raise UserError(f"cannot meet the other ranks ({_first_line(error)}); start with torchrun") from error


def stop() -> None:
    """Leave the default process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end the process with its exit code.

    Args:
        main: the program; returns an exit code, None for 0.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored in what nohup or a script's & started
        signal.signal(signal.SIGINT, _end_interrupted)
    try:
        code = main() or 0
    except UserError as error:
        code = EXIT_USER_ERROR
        _report_user_error(error)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        code = 1
        _report_defect(error)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None where whoever started the program had closed it
            with contextlib.suppress(OSError):  # whoever read it has gone
                stream.flush()
    if code:
        os._exit(code)
    stop()
    sys.exit(0)


def _end_interrupted(signal_number: int, frame: Any) -> None:
    """End on Ctrl-C, here and now: an exception might be caught, or wait for other ranks, on its way up."""
    if global_rank() == 0:
        with contextlib.suppress(OSError):  # not through a buffer, which this may have come in the middle of
            os.write(2, b"\nmegamed: interrupted; run the same command again to go on from the last checkpoint\n")
    os._exit(EXIT_INTERRUPTED)


def _report_user_error(error: UserError) -> None:
    _let_others_speak(error)
    _tell_torchrun(str(error))
    _say(f"error{_who()}: {error}")


def _report_defect(error: BaseException) -> None:
    _let_others_speak(error)
    _tell_torchrun(f"{type(error).__name__}: {_first_line(error)}")
    _say(f"failed{_who()}:\n{traceback.format_exc()}")


def _who() -> str:
    return f" [rank {global_rank()}]" if global_rank() else ""


def _say(text: str) -> None:
    line_break = "\n" if global_rank() else ""  # off the line of rank 0's progress bar
    print(f"{line_break}megamed: {text}", file=sys.stderr, flush=True)


def _let_others_speak(error: BaseException) -> None:
    """Wait, where another rank has the cause of this error or the same error, until torchrun ends this one."""
    if world_size() == 1:
        return
    is_rank_0s = isinstance(error, UserError) and error.everywhere and global_rank() > 0
    if is_rank_0s or _is_consequence(error):
        time.sleep(_CONSEQUENCE_DELAY_S)
    elif global_rank() > 0:  # perhaps the same as rank 0's
        time.sleep(_SAME_ERROR_DELAY_S)


def _is_consequence(error: BaseException | None) -> bool:
    """Whether this error, or one that it came from, says that a peer is gone."""
    while error is not None:
        if any(sign in str(error) for sign in _CONSEQUENCES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for it, so that its closing report names the cause.

    The format is that of `torch.distributed.elastic.multiprocessing.errors.ErrorHandler`. torchrun fails
    on half a file, hence the rename.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        reply = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        try:
            with open(f"{path}.new", "w") as file:
                json.dump(reply, file)
            os.replace(f"{path}.new", path)
        except OSError:
            pass  # the message is on the screen; torchrun then reports the exit code alone


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
