"""What a run leaves behind: metrics that are right, and trackers that say nothing of the place or the people."""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import nibabel
import pytest
import yaml

from tests.launch.command import ROOT, SCRIPT, SMALL, run

RUN = Path(nibabel.__file__).parent / "tests" / "data" / "functional.nii"
STEPS = 8

# Runs the script under a host name of its own, where the system lets it: names of real hosts may be too short
# to look for among random bytes.
ELSEWHERE = """
import ctypes, runpy, socket

NEW_HOST_NAMES = 0x04000000  # CLONE_NEWUTS
if ctypes.CDLL(None).unshare(NEW_HOST_NAMES) == 0:
    socket.sethostname("ward7-workstation")
print("HOST", socket.gethostname(), flush=True)
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything on, of a user, a host and a patient with names: its folder, output, host, seconds."""
    home = tmp_path_factory.mktemp("outputs") / "drjones"
    data = home / "patient-doe" / "run.nii"
    data.parent.mkdir(parents=True)
    shutil.copy(RUN, data)
    script = home / "elsewhere.py"
    script.write_text(ELSEWHERE.format(script=str(SCRIPT)))
    args = [arg for arg in SMALL if not arg.startswith("wandb")]
    began = time.monotonic()
    code, output = run(
        home / "log", *args, f"run.dir={home}/runs", f"data.path={data}", f"train.steps={STEPS}",
        "optim.warmup_steps=2", script=script,
        env={"USER": "drjones", "LOGNAME": "drjones", "USERNAME": "drjones", "HOME": str(home)},
    )
    assert code == 0, output
    host = next(line.split()[1] for line in output.splitlines() if line.startswith("HOST"))
    return home / "runs" / "fmri", output, host, time.monotonic() - began


def test_metrics_have_a_line_for_each_step(finished):
    folder, _, _, seconds = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # What was applied in each step: warm-up from 0 over 2 steps, and cosine's start.
    assert [line["lr"] for line in lines[:3]] == pytest.approx([0.0, 1e-3, 2e-3])
    assert lines[-1]["lr"] < 2e-3
    for line in lines:
        assert 0 < line["loss"] < 10 and line["grad_norm"] > 0
        assert 0 < line["data_seconds"] < line["seconds"]
        assert 0 < line["labels"] < line["tokens"] <= 2 * 512 and line["frames"] > 0
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"], rel=1e-3)
        assert 0 < line["mfu"] < 1
        # Python with torch takes more than 0.1 GiB, and this model nearly nothing.
        assert 0.1 < line["peak_memory_gib"] < 4
    assert sum(line["seconds"] for line in lines) < seconds
    peaks = [line["peak_memory_gib"] for line in lines]
    assert peaks == sorted(peaks)


def test_trackers_say_nothing_of_place_or_people(finished):
    folder, _, host, _ = finished
    names = ["drjones", "patient-doe", str(ROOT), *([host] if len(host) > 5 else [])]
    assert host == "ward7-workstation" or os.geteuid()
    # The configuration is the user's own, with the path that the user gave.
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    assert len([path for path in files if path.suffix == ".wandb"]) == 1
    for path in files:
        content = path.read_bytes()
        assert not [name for name in names if name.encode() in content], path
        assert not path.is_symlink()
    assert not list(folder.glob("wandb/*/logs")) and not list(folder.glob("wandb/*/files/*"))


def test_wandb_has_the_losses(finished):
    folder, _, _, _ = finished
    content = next(folder.glob("wandb/*/*.wandb")).read_bytes()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert str(json.loads(line)["loss"]).encode() in content


def test_the_card_says_what_the_checkpoint_is(finished):
    folder, _, _, _ = finished
    card = json.loads((folder / "checkpoints" / f"step_{STEPS:08d}" / "megamed.json").read_text())
    assert (card["step"], card["position"], card["world_size"]) == (STEPS, 2 * STEPS, 1)
    assert card["optimizer"] == {"optim.distributed": True, "train.dtype": "fp32"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == STEPS


def test_a_log_file_is_not_flooded(finished):
    """The bar comes at the start, at the end, and every 10 s in between: not with each step."""
    _, output, _, seconds = finished
    bars = [line for line in output.splitlines() if line.startswith("train:")]
    assert len(bars) <= 3 + seconds / 10 < STEPS
    assert f"{STEPS}/{STEPS}" in bars[-1] and "loss " in bars[-1] and "tokens/s" in bars[-1]


def test_an_apex_that_is_not_nvidias_is_named(tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemError('not to be imported')")
    script = tmp_path / "with_apex.py"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    code, output = run(tmp_path / "log", *SMALL, f"run.dir={tmp_path}/runs", "train.steps=1", script=script)
    assert code == 0, output
    assert f"The package apex at {tmp_path}/apex/__init__.py is not NVIDIA's Apex" in output


def test_online_without_an_account_is_one_line(tmp_path):
    code, output = run(
        tmp_path / "log", *SMALL, f"run.dir={tmp_path}/runs", "wandb.mode=online",
        env={"WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"),
             "WANDB_BASE_URL": f"http://{socket.gethostbyname('localhost')}:9"},
    )
    assert code == 2 and "Traceback" not in output, output
    assert "wandb.mode=online: Weights & Biases does not start (" in output and "wandb.mode=disabled" in output
