"""+exp=ct: from real CT series in a volume store to a model, killed and resumed, and what a user can get wrong."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.command import ROOT, errors, run, start
from tests.real_data import SHARED, needs

pytestmark = needs("ct_head_ge", "ct_phantom")

# A run that is over in a few seconds.
FEW = ("+exp=ct", "wandb.mode=disabled", "eval.max_new_tokens=2", "eval.blank_control=false",
       "model.language.num_layers=2", "model.vision.num_layers=1", "train.microbatches=2",
       "data.packing.rows_per_block=4", "data.frames.augment.enabled=true")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two real series of two patients."""
    folder = tmp_path_factory.mktemp("ct") / "store"
    sources = [str(SHARED / name) for name in ("ct_head_ge", "ct_phantom")]
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "ingest.py"), *sources, "--out", str(folder)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> tuple[Path, str]:
    """A run of 8 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = run(folder / "log", *FEW, f"data.store={store}", f"run.dir={folder}", "train.steps=8")
    assert code == 0, output
    return folder / "ct", output


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"], line["frames"]) for line in lines(folder)]


def test_it_trains_and_asks_about_the_patient_that_it_never_saw(finished):
    folder, output = finished
    assert "volume store: 2 series of 2 patients; 1 series to train on, 1 of 1 patients held out" in output
    assert "held-out questions answered right" in output and "num_slices" in output
    steps = lines(folder)
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"] and all(line["frames"] > 0 for line in steps)
    assert all(0 < line["data_seconds"] < line["seconds"] for line in steps)
    card = json.loads((folder / "checkpoints" / "step_00000008" / "megamed.json").read_text())
    assert card["position"] == 16 and card["data"]["fingerprint"]["data sets"]["facts"]["samples"] == 1


def test_killed_it_goes_on_bit_for_bit(finished, store, tmp_path):
    args = (*FEW, f"data.store={store}", f"run.dir={tmp_path}", "train.steps=8", "checkpoint.every_steps=3")
    job = start(tmp_path / "log", *args)
    while job.is_running() and not (tmp_path / "ct" / "checkpoints" / "step_00000003").exists():
        time.sleep(0.02)
    job.kill_tree()
    assert len(losses(tmp_path / "ct")) < 8
    code, output = run(tmp_path / "log", *args)
    assert code == 0 and "going on from" in output, output
    assert losses(tmp_path / "ct") == losses(finished[0])


def test_other_data_are_noticed_before_training(finished, store, tmp_path):
    folder = tmp_path / "ct"
    shutil.copytree(finished[0], folder)
    args = (*FEW, f"data.store={store}", f"run.dir={tmp_path}", "train.steps=9", "data.questions=1")
    code, output = run(tmp_path / "log", *args)
    assert code == 2 and len(errors(output)) == 1 and "Traceback" not in output, output
    assert "data.questions was 3, is 1" in errors(output)[0] and "data.accept_changes=true" in errors(output)[0]
    code, output = run(tmp_path / "log", *args, "data.accept_changes=true")
    assert code == 0 and "going on with new rows" in output, output
    assert [line["step"] for line in lines(folder)] == list(range(1, 10))


@pytest.mark.parametrize(("args", "says"), [
    ((), ("data.store: a value is required", "data.store=...")),
    (("data.store=nowhere",), ("nowhere is not a volume store", "tools/ingest.py SOURCE --out STORE")),
    (("data.store=STORE", "data.datasets=[{name: talk, path: TALK}]"),
     ("talk.jsonl:1: series abc is not in", "data.store")),
    (("data.store=STORE", "data.datasets=[{name: talk, pth: TALK}]"),
     ("data.datasets[0].pth: no such key; did you mean data.datasets[0].path?",)),
    (("data.store=STORE", "data.loader.bakend=numpy"),
     ("data.loader.bakend: no such key; did you mean data.loader.backend?",)),
    (("data.store=STORE", "data.frames.ct_windows=[lung,liver,bonee]"), ("data.frames.ct_windows", "bonee")),
    (("data.store=STORE", "data.seq_length=128"), ("data set facts: none of its 1 samples can be used", "seq_length")),
])
def test_what_cannot_be_is_one_line(args, says, store, tmp_path):
    talk = tmp_path / "talk.jsonl"
    talk.write_text('{"messages": [{"role": "assistant", "content": "A"}], "studies": ["abc"]}\n')
    args = [arg.replace("STORE", str(store)).replace("TALK", str(talk)) for arg in args]
    code, output = run(tmp_path / "log", *FEW, f"run.dir={tmp_path}/runs", *args)
    assert code == 2 and "Traceback" not in output, output
    assert len(errors(output)) == 1 and all(text in errors(output)[0] for text in says), output
