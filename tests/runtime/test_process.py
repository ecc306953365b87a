"""How a rank's process ends: exit codes, what is on the screen, and what torchrun reads of it."""

import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megamed.runtime import process, start
from megamed.utils import UserError

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["megamed.testing.preload"])


def succeed() -> None:
    print("printed at the end")


def user_error() -> None:
    raise UserError("disk.img is full; free space there")


def error_everywhere() -> None:
    raise UserError("data.pth: no such key", everywhere=True)


def defect() -> None:
    raise ZeroDivisionError("division by zero\nsecond line")


def lost_peer() -> None:
    try:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31012")
    except RuntimeError as error:
        raise UserError("step_00000002: cannot be loaded") from error


def leave() -> None:
    sys.exit(7)


def leave_with_text() -> None:
    sys.exit("text")


def interrupt() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except BaseException:  # what code on the way up may do
        time.sleep(60)


def meet() -> None:
    start(timeout_minutes=0.2)


def _serve(main: Callable[[], None], log: str, env: dict[str, str], delays: tuple[float, float]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(env)
    process._SAME_ERROR_DELAY_S, process._CONSEQUENCE_DELAY_S = delays
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process.run(main)


def end(
    main: Callable[[], None], folder: Path, delays: tuple[float, float] = (0.0, 0.0), **env: str
) -> tuple[int, str, float]:
    """Exit code, output, and the seconds until a process with this `main` had ended."""
    log = folder / f"log{len(list(folder.iterdir()))}"
    log.touch()
    child = CONTEXT.Process(target=_serve, args=(main, str(log), env, delays), daemon=True)
    child.start()
    began = time.monotonic()
    child.join(30)
    seconds = time.monotonic() - began
    assert child.exitcode is not None, "it did not end"
    return child.exitcode, log.read_text(), seconds


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """Start the server of processes once, so that its imports count in no measured time."""
    assert end(succeed, tmp_path_factory.mktemp("first"))[:2] == (0, "printed at the end\n")


def test_exit_codes(tmp_path):
    assert end(leave, tmp_path)[:2] == (7, "")
    assert end(leave_with_text, tmp_path)[0] == 1
    code, output, _ = end(defect, tmp_path)
    assert code == 1
    assert output.startswith("megamed: failed:\nTraceback")
    assert output.rstrip().endswith("second line")


def test_a_user_error_is_one_line(tmp_path):
    assert end(user_error, tmp_path)[:2] == (2, "megamed: error: disk.img is full; free space there\n")


def test_ctrl_c_ends_whatever_the_code_catches(tmp_path):
    code, output, seconds = end(interrupt, tmp_path)
    assert code == 130
    assert output == "\nmegamed: interrupted; run the same command again to go on from the last checkpoint\n"
    assert seconds < 10  # of the 60 that the code would wait


def test_a_rank_other_than_0_leaves_the_first_word_to_it(tmp_path):
    """On rank 0 the same error is there at once."""
    delays = (1.5, 2.0)
    of_two = {"WORLD_SIZE": "2"}
    assert end(user_error, tmp_path, delays, RANK="0", **of_two)[2] < 1.5
    code, output, seconds = end(user_error, tmp_path, delays, RANK="1", **of_two)
    assert (code, seconds >= 1.5) == (2, True)
    assert output == "\nmegamed: error [rank 1]: disk.img is full; free space there\n"
    assert end(error_everywhere, tmp_path, delays, RANK="1", **of_two)[2] >= 2.0
    assert end(error_everywhere, tmp_path, delays, RANK="0", **of_two)[2] < 1.5


def test_a_rank_that_lost_its_peer_waits_to_be_ended(tmp_path):
    """Also where the loss is wrapped in another error, and on rank 0."""
    code, _, seconds = end(lost_peer, tmp_path, (0.0, 1.0), RANK="0", WORLD_SIZE="2")
    assert (code, seconds >= 1.0) == (2, True)


@pytest.mark.parametrize(("main", "code", "message"), [
    (user_error, 2, "disk.img is full; free space there"),
    (defect, 1, "ZeroDivisionError: division by zero"),
])
def test_torchrun_can_read_the_cause(main, code, message, tmp_path):
    path = tmp_path / "error.json"
    end(main, tmp_path, TORCHELASTIC_ERROR_FILE=str(path))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(path))
    assert abs(failure.timestamp - time.time()) < 60
    report = ChildFailedError("pretrain.py", {0: failure}).format_msg()
    assert f"traceback : {message}" in report.partition("Root Cause")[2]
    assert list(tmp_path.glob("error.json*")) == [path]
    assert set(json.loads(path.read_text())["message"]) == {"message", "extraInfo"}


def test_an_error_file_that_cannot_be_written_changes_nothing(tmp_path):
    code, output, _ = end(user_error, tmp_path, TORCHELASTIC_ERROR_FILE="/proc/nowhere/error.json")
    assert (code, output) == (2, "megamed: error: disk.img is full; free space there\n")


def test_a_port_that_another_program_has(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, output, _ = end(meet, tmp_path, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert code == 2 and "Traceback" not in output
    line = output.splitlines()[-1]
    assert line.startswith(f"megamed: error: cannot meet the other ranks at 127.0.0.1:{port}")
    assert "EADDRINUSE" in line and "--master-port" in line


def test_a_variable_that_a_launcher_should_have_set(tmp_path):
    code, output, _ = end(meet, tmp_path, RANK="0", WORLD_SIZE="1")
    assert code == 2
    assert "MASTER_ADDR" in output and output.rstrip().endswith("start with torchrun")
