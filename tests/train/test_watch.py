"""Signs of life, an end to what hangs, and what a run's folder keeps so that the run can be made again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamed.train.record import rerun_script, source_state
from tests.launch.command import ROOT, SCRIPT, SMALL, run, start, torchrun

# Runs the script with a rank that waits for ever in its third step, the first time.
HANGING = """
import os, runpy, time
import megamed.train.step as step

original, taken = step.Stepper.train, []

def train(self, *args):
    taken.append(1)
    if len(taken) == 3 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and os.environ.get("RANK") == "1":
        time.sleep(1000)
    return original(self, *args)

step.Stepper.train = train
runpy.run_path({script!r}, run_name="__main__")
"""


def status(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, ROOT / "tools" / "status.py", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    code, output = run(folder / "log", *SMALL, "train.steps=4", "checkpoint.every_steps=2", f"run.dir={folder}/runs")
    assert code == 0, output
    return folder / "runs" / "fmri"


def test_a_hung_rank_is_ended_and_the_job_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING.format(script=str(SCRIPT)))
    settings = (*SMALL, f"run.dir={tmp_path}/runs", "train.steps=4", "checkpoint.every_steps=1")
    job = torchrun(tmp_path / "log", *settings, "run.hang_minutes=0.05", script=script,
                   env={"PYTHONPATH": str(ROOT), "PET_MAX_RESTARTS": "1"})  # fmt: skip
    code, output = job.wait()
    assert code == 0, output
    folder = tmp_path / "runs" / "fmri"
    # Whoever was first to see it said so, and what each of its threads did is there; rank 1's say that it slept.
    assert "step 3 has not ended in 0.05 minutes (run.hang_minutes); where each thread was is in" in output
    stacks = {path.name: path.read_text() for path in (folder / "hangs").iterdir()}
    assert stacks and all("most recent call first" in text for text in stacks.values())
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [(start["restart"], start["world_size"]) for start in starts] == [(0, 2), (1, 2)]
    assert starts[1]["step"] in (1, 2), "the save after step 2 may not have been over"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert status(str(folder))[1].splitlines()[1].split()[1] == "complete"


def test_a_request_to_stop_saves_and_the_rest_comes_later(finished: Path, tmp_path: Path) -> None:
    settings = (*SMALL, f"run.dir={tmp_path}/runs", "checkpoint.every_steps=0")
    told = tmp_path / "told"
    job = start(tmp_path / "log", *settings, "train.steps=100000", env={"MEGAMED_STOP_FILE": str(told)})
    folder = tmp_path / "runs" / "fmri"
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert job.is_running() and time.monotonic() < end, job.log.read_text()
        time.sleep(0.05)
    assert status(str(folder))[0] == 0
    job.send(signal.SIGUSR1)
    code, output = job.wait()
    step = int(told.read_text())
    assert code == 0 and f"stopping after step {step}, as asked" in output, output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    code, said = status(str(folder), str(finished))
    assert code == 1 and said.splitlines()[1].split()[1] == "stopped"


def test_status(finished: Path, tmp_path: Path) -> None:
    code, said = status(str(finished))
    assert code == 0
    assert said.splitlines()[1].split()[:3] == ["fmri", "complete", "4/4"] and "step_00000004" in said
    code, said = status(str(finished), "--json")
    found = json.loads(said)
    assert (found["step"], found["starts"], found["ranks"], found["checkpoint"]) == (4, 1, 1, "step_00000004")
    assert found["tokens_per_second"] > 0 and found["loss"] > 0
    # One that said that it trains, an hour ago.
    (tmp_path / "config.yaml").write_text("train: {steps: 9}\n")
    (tmp_path / "alive.json").write_text(json.dumps({"state": "training", "step": 3, "time": time.time() - 7200}))
    code, said = status(str(tmp_path))
    assert code == 1 and "dead (2 h silent)" in said and "0/9" in said
    slow = {"rank": 3, "node": "n2", "what": "encodes a frame in 1.50 times what others take"}
    (tmp_path / "stragglers.jsonl").write_text(json.dumps({"step": 3, "slow": [slow]}) + "\n")
    assert "rank 3 on n2 encodes a frame in 1.50 times" in status(str(tmp_path))[1]
    assert status(str(tmp_path / "nowhere"))[0] == 2


def test_a_run_can_be_made_again(finished: Path, tmp_path: Path) -> None:
    kept: dict[str, Any] = {name: json.loads((finished / name).read_text()) for name in ("source.json", "data.json")}
    assert len(kept["data.json"]["sha256"]) == 64 and set(kept["source.json"]) == {"commit", "is_changed"}
    script = finished / "rerun.sh"
    assert os.access(script, os.X_OK) and "launch/pretrain.py --config" in script.read_text()
    command = ["bash", str(script), f"run.dir={tmp_path}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
              for run in (finished, tmp_path / "fmri")]  # fmt: skip
    assert losses[0] == losses[1]
    before, after = (yaml.safe_load((run / "config.yaml").read_text()) for run in (finished, tmp_path / "fmri"))
    assert before | {"run": None} == after | {"run": None}


def test_the_script_of_several_nodes() -> None:
    source = {"commit": "abc", "is_changed": True}
    text = rerun_script(source, 16, {"LOCAL_WORLD_SIZE": "8"})
    assert "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HEAD launch" in text
    assert "at commit abc, with uncommitted.diff applied" in text and '--config "$config" run.resume=no' in text
    assert "torchrun --nproc-per-node 2 launch" in rerun_script(source, 2, {"LOCAL_WORLD_SIZE": "2"})


def test_what_differs_from_the_commit(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    assert source_state(tmp_path) == ({"commit": None, "is_changed": None}, "")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a.yaml").write_text("a: 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    state, difference = source_state(tmp_path)
    assert len(state["commit"]) == 40 and state["is_changed"] is False and difference == ""
    (tmp_path / "conf" / "a.yaml").write_text("a: 2\n")
    state, difference = source_state(tmp_path)
    assert state["is_changed"] is True and "+a: 2" in difference
