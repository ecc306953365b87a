"""The job scripts on a real Slurm of two nodes: they run through, and interruptions change no bit of a curve."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megamed.checkpoint.card import list_checkpoints
from megamed.testing.slurm import LocalSlurm, is_installed
from tests.checkpoint.hf.folders import release
from tests.launch.command import ROOT, torchrun

pytestmark = pytest.mark.skipif(not is_installed(), reason="needs root, and a Slurm: tools/install_slurm.sh")

SMALL = (
    "model=internvl_tiny", "parallel=single", "data.tokenizer=bytes", "data.seq_length=512", "data.max_volumes=4",
    "train.microbatches=2", "eval.held_out=false", "wandb.mode=disabled", "model.language.num_layers=2",
    "model.vision.num_layers=1", "optim.warmup_steps=2", "optim.decay_steps=40",
)  # fmt: skip
SECONDS = 180.0  # until something has to have happened, on a machine that does other things too


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    cluster = LocalSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Job:
    """A job under way, with its files in one folder."""

    def __init__(self, cluster: LocalSlurm, folder: Path, *arguments: str, **environment: str):
        self.cluster, self.folder, self.output = cluster, folder, folder / "out.log"
        environment = {"MEGAMED_LOGS": str(folder / "logs"), **environment}
        self.number = cluster.sbatch(f"--output={self.output}", *arguments, cwd=ROOT, **environment)

    def wait(self, holds: Callable[[], Any]) -> None:
        end = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < end, f"{self.state()}\n{self.said()}"
            time.sleep(0.1)

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def ended(self) -> bool:
        return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def said(self) -> str:
        logs = [self.output, *sorted(self.folder.rglob("logs/**/*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in logs if path.exists())


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What is computed; JSON keeps every bit of a float."""
    return [tuple(line[key] for key in ("step", "loss", "grad_norm", "lr", "tokens")) for line in metrics(run)]


def test_two_nodes_run_through(cluster: LocalSlurm, tmp_path: Path) -> None:
    settings = (*SMALL, f"run.dir={tmp_path}/runs", "train.steps=3")
    job = Job(cluster, tmp_path, "--nodes=2", "--gpus-per-node=1", "slurm/train_internvl26b.sh", *settings)
    job.wait(job.ended)
    assert job.state() == "COMPLETED", job.said()
    assert "megamed: 2 ranks on 2 nodes meet, sum at" in job.output.read_text()
    run = tmp_path / "runs" / "internvl26b"
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    start = json.loads((run / "starts.jsonl").read_text())
    assert (start["world_size"], start["nodes"], start["slurm_job"]) == (2, 2, job.number)
    # A log for each node and program.
    names = sorted(path.name for path in (tmp_path / "logs" / str(job.number)).iterdir())
    assert names == [f"start1-{program}-node{node}.log" for program in ("check", "train") for node in (0, 1)]


def test_whatever_interrupts_it_the_curve_is_the_same(cluster: LocalSlurm, tmp_path: Path) -> None:
    settings = (*SMALL, "checkpoint.every_steps=5", "train.steps=100000")
    job = Job(
        cluster, tmp_path, "--nodes=2", "--gpus-per-node=1", "--time=60", "--signal=USR1@20",
        "slurm/train_internvl26b.sh", *settings, f"run.dir={tmp_path}/runs", MEGAMED_CHECK="0",
    )  # fmt: skip
    run = tmp_path / "runs" / "internvl26b"

    def trains_after(step: int) -> Callable[[], bool]:
        return lambda: bool(lines := metrics(run)) and lines[-1]["step"] >= step + 3

    def starts_again(times: int) -> int:
        """The step that it goes on after."""
        starts = run / "starts.jsonl"
        job.wait(lambda: starts.read_text().count("\n") == times + 1)
        start = json.loads(starts.read_text().splitlines()[-1])
        assert start["slurm_restart"] == times
        job.wait(trains_after(start["step"]))
        return int(start["step"])

    job.wait(trains_after(5))
    cluster.command("scancel", "--signal=USR1", str(job.number))
    asked = starts_again(1)
    assert f"stopped after step {asked}; queued again" in job.output.read_text()

    job.wait(lambda: list_checkpoints(run / "checkpoints")[-1].name > f"step_{asked:08d}")
    cluster.kill_node("n2")
    job.wait(lambda: int(cluster.job(job.number)["Restarts"]) == 2)
    cluster.start_node("n2")
    after_kill = starts_again(2)
    assert after_kill > asked

    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    before_limit = starts_again(3)
    assert f"stopped after step {before_limit}; queued again" in job.output.read_text()
    cluster.command("scancel", "--signal=KILL", "--full", str(job.number))
    cluster.command("scancel", str(job.number))
    job.wait(job.ended)

    steps = len(curve(run))
    # The same settings but for the number of steps, which decides nothing before they are taken.
    whole = ("+exp=internvl26b", *settings[:-1], f"train.steps={steps}", f"run.dir={tmp_path}/whole")
    code, output = torchrun(tmp_path / "whole.log", *whole).wait(timeout_s=2 * SECONDS)
    assert code == 0, output
    assert curve(run) == curve(tmp_path / "whole" / "internvl26b")


def test_a_conversion(cluster: LocalSlurm, tmp_path: Path) -> None:
    import torch

    release(tmp_path / "hf", "internlm2", torch.float32)
    job = Job(cluster, tmp_path, "--mem=1G", "--cpus-per-task=1", "slurm/convert.sh", "import", str(tmp_path / "hf"),
              "--to", str(tmp_path / "checkpoint"))  # fmt: skip
    job.wait(job.ended)
    assert job.state() == "COMPLETED", job.said()
    assert (tmp_path / "checkpoint" / "megamed.json").is_file()


def test_what_is_wrong_is_said_at_once(cluster: LocalSlurm, tmp_path: Path) -> None:
    one = ("--nodes=1", "--gpus-per-node=1", "slurm/train_fmri.sh")
    job = Job(cluster, tmp_path, *one, MEGAMED_PYTHON="/nowhere/python")
    job.wait(job.ended)
    assert job.state() == "FAILED"
    assert "megamed: error: /nowhere/python is not there; run make install in" in job.output.read_text()
    (tmp_path / "file").write_text("")
    job = Job(cluster, tmp_path, *one, *SMALL, f"run.dir={tmp_path}/file/runs")
    job.wait(job.ended)
    said = job.output.read_text()
    assert job.state() == "FAILED" and "cannot be written (Not a directory); set run.dir to a folder that can" in said
    assert "megamed: error: the check of nodes, network and storage failed" in said


def test_scripts_say_how_they_are_started() -> None:
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if script.name not in ("common.sh", "node.sh"):
            done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 2 and f"submit it: sbatch slurm/{script.name}" in done.stderr
            done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=ROOT / "docs")
            assert done.returncode == 2 and "call sbatch in megamed's folder" in done.stderr
