"""A real Slurm on this machine, for tests: a controller and two nodes, each with a daemon of its own.

Debian's build takes several node daemons on one host (`slurmd -N NAME`, a port each). It needs root, as any cluster's
daemons do, and nothing of the system's own configuration: all it has lies in one folder.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

# Node daemons that do not answer are down after so many seconds; jobs on them are queued again then.
_DOWN_SECONDS = 10

_CONFIGURATION = """
ClusterName=megamed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout={down}
KillWait=5
MailProg=/bin/true
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs={cpus} RealMemory=2000 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_installed() -> bool:
    """Whether it can be started here."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch"))


class LocalSlurm:
    """A cluster of the nodes n1 and n2, each with one GPU by name.

    Args:
        folder: an empty one, for all that it writes.
    """

    def __init__(self, folder: Path):
        self.folder, self._daemons = folder, dict[str, subprocess.Popen[bytes]]()
        host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
        configuration = _CONFIGURATION.format(
            host=host, folder=folder, port=ports[0], first=ports[1], second=ports[2], down=_DOWN_SECONDS,
            cpus=max((os.cpu_count() or 2) // 2, 1) * 2,
        )  # fmt: skip
        # A range of ports is of neighbours.
        configuration = configuration.replace(f"Port=[{ports[1]}-{ports[2]}]", f"Port=[{ports[1]}-{ports[1] + 1}]")
        (folder / "slurm.conf").write_text(configuration)
        (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/zero\n")
        (folder / "state").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons, and wait until both nodes are there.

        Raises:
            TimeoutError: they are not, with the end of the logs.
        """
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in names.items()]
        self._launch("munged", "munged", "--foreground", "--force", *options)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._launch("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        self._wait(lambda: self.command("sinfo", "-h", "-o", "%T", check=False).split() == ["idle"], "nodes")

    def start_node(self, node: str) -> None:
        """Start a node's daemon, or start it again."""
        self._launch(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """End a node as a power cut does: its daemon, and every process of jobs on it."""
        daemon = self._daemons.pop(node)
        for pid in [daemon.pid, *_of_node(node, self.folder)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def sbatch(self, *arguments: str, cwd: Path, **environment: str) -> int:
        """Submit a job; its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], cwd=cwd, env={**self.environment, **environment}, text=True,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def command(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=check)
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What the controller says of a job: JobState, Restarts, ExitCode, ..."""
        words = self.command("scontrol", "show", "job", str(number), "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """End all daemons and jobs."""
        self.command("scancel", "--user=root", check=False)
        for name in reversed(list(self._daemons)):
            daemon = self._daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _launch(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def _wait(self, holds, what: str, seconds: float = 30.0) -> None:  # type: ignore[no-untyped-def]
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                logs = "\n".join(f"{path}: {path.read_text()[-1500:]}" for path in _logs(self.folder))
                raise TimeoutError(f"{what} did not come up in {seconds:g} s\n{logs}")
            time.sleep(0.1)


def _logs(folder: Path) -> Sequence[Path]:
    return sorted([*folder.glob("*.log"), *folder.glob("*.out")])


def _of_node(node: str, folder: Path) -> list[int]:
    """Processes of jobs that run on a node: those that Slurm told so."""
    found, wanted = [], {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={folder}/slurm.conf".encode()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted <= set(path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
