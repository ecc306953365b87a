"""Bad steps, by policy: the weights never see their gradient, and what follows is what should."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megamed.checkpoint.sums import SUMS, write_sums
from megamed.train.config import FaultsConfig
from megamed.train.faults import Faults, _norms
from tests.launch.command import ROOT, SCRIPT, SMALL, errors, run, torchrun

# Runs the script with one step's gradient multiplied, on one rank.
POISONED = """
import os, runpy
import megamed.train.step as step

original, taken = step.Stepper.gradients, []

def gradients(self, *args):
    report = original(self, *args)
    taken.append(1)
    if len(taken) == int(os.environ["POISONED_STEP"]) and os.environ.get("RANK", "0") == os.environ["POISONED_RANK"]:
        for parameter in self.model.language[0].parameters():
            parameter.main_grad.mul_(float(os.environ["FACTOR"]))
    return report

step.Stepper.gradients = gradients
runpy.run_path({script!r}, run_name="__main__")
"""
STEP = 5
SETTINGS = (*SMALL, "checkpoint.every_steps=1", "checkpoint.keep_last=0", "train.faults.min_steps=3")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "poisoned.py"
    path.write_text(POISONED.format(script=str(SCRIPT)))
    return path


def poisoned(script: Path, folder: Path, factor: str, *settings: str) -> tuple[int, str]:
    env = {"POISONED_STEP": str(STEP), "POISONED_RANK": "0", "FACTOR": factor, "PYTHONPATH": str(ROOT)}
    return run(folder / "log", *SETTINGS, "train.steps=8", f"run.dir={folder}", *settings, script=script, env=env)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in ("step", "loss", "grad_norm", "lr")) for line in lines(folder / "metrics.jsonl")]


def state(folder: Path, step: int) -> dict[str, bytes]:
    """All that the model and the optimizer hold after a step, to the last bit."""
    reader = FileSystemReader(folder / "checkpoints" / f"step_{step:08d}")
    stored = reader.read_metadata().state_dict_metadata.items()
    kept = {key: value for key, value in stored if isinstance(value, TensorStorageMetadata)}
    tensors = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in kept.items()}
    distributed_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return {key: tensor.view(torch.uint8).numpy().tobytes() for key, tensor in tensors.items()}


@pytest.mark.parametrize(("factor", "what"), [("nan", "not_finite"), ("1e4", "spike")])
def test_a_step_that_is_left_out_changes_nothing(factor: str, what: str, script: Path, tmp_path: Path) -> None:
    code, output = poisoned(script, tmp_path, factor, f"train.faults.{what}=skip")
    assert code == 0, output
    folder = tmp_path / "fmri"
    assert state(folder, STEP) == state(folder, STEP - 1) != state(folder, STEP - 2)
    (fault,) = lines(folder / "faults.jsonl")
    assert (fault["step"], fault["what"], fault["done"]) == (STEP, what, "skip")
    assert len(fault["samples"]) == 2 and all(name for row in fault["samples"] for name in row)
    assert "its gradient is not applied (faults.jsonl has its samples)" in output
    skipped = [line["step"] for line in lines(folder / "metrics.jsonl") if line.get("skipped")]
    assert skipped == [STEP] and [line[0] for line in curve(folder)] == list(range(1, 9))
    # The next step has the rate that this one would have had; a run that goes on knows how many were left out.
    rates = [line[3] for line in curve(folder)]
    assert rates[STEP - 1] == rates[STEP] != rates[STEP + 1]
    again = Path(shutil.copytree(folder, tmp_path / "again" / "fmri"))
    for step in (7, 8):
        shutil.rmtree(again / "checkpoints" / f"step_{step:08d}")
    settings = (f"train.faults.{what}=skip", "train.steps=8", f"run.dir={again.parent}")
    code, output = run(tmp_path / "log2", *SETTINGS, *settings)
    assert code == 0 and "going on from" in output, output
    assert curve(again) == curve(folder) and state(again, 8) == state(folder, 8)


def test_going_back_passes_over_the_batch(script: Path, tmp_path: Path) -> None:
    code, output = poisoned(script, tmp_path, "1e4", "train.faults.spike=rollback", "checkpoint.every_steps=3")
    assert code == 0, output
    folder = tmp_path / "fmri"
    assert "going back to the last checkpoint" in output
    assert "going on from step 3 with the data from row 10 on" in output
    assert [line["done"] for line in lines(folder / "faults.jsonl")] == ["rollback"]
    # The same by hand: a run of 3 steps, whose checkpoint then says that its data go on at row 10.
    settings = (*SETTINGS, "checkpoint.every_steps=3", "train.steps=8", f"run.dir={tmp_path}/hand")
    code, output = run(tmp_path / "log2", *settings)
    assert code == 0, output
    hand = tmp_path / "hand" / "fmri" / "checkpoints"
    for step in (6, 8):
        shutil.rmtree(hand / f"step_{step:08d}")
    card = json.loads((hand / "step_00000003" / "megamed.json").read_text())
    (hand / "step_00000003" / "megamed.json").write_text(json.dumps(card | {"position": 10}))
    (hand / "step_00000003" / SUMS).unlink()
    write_sums(hand / "step_00000003", {})
    code, output = run(tmp_path / "log3", *settings)
    assert code == 0 and "going on from" in output, output
    assert curve(folder) == curve(tmp_path / "hand" / "fmri")


def test_both_ranks_judge_alike(script: Path, tmp_path: Path) -> None:
    """One of two replicas has a gradient that is no number."""
    env = {"POISONED_STEP": "3", "POISONED_RANK": "1", "FACTOR": "inf", "PYTHONPATH": str(ROOT)}
    job = torchrun(tmp_path / "log", *SETTINGS, "train.faults.not_finite=skip", "train.steps=4", f"run.dir={tmp_path}",
                   script=script, env=env)  # fmt: skip
    code, output = job.wait()
    assert code == 0, output
    assert output.count("its gradient is not applied") == 1
    assert [len(fault["samples"]) for fault in lines(tmp_path / "fmri" / "faults.jsonl")] == [2], "of both replicas"


def test_by_default_it_stops_and_says_where(script: Path, tmp_path: Path) -> None:
    code, output = poisoned(script, tmp_path, "nan")
    assert code == 2 and len(errors(output)) == 1, output
    assert f"step {STEP}: the gradient norm is nan" in errors(output)[0] and "faults.jsonl" in errors(output)[0]
    assert lines(tmp_path / "fmri" / "faults.jsonl")[0]["done"] == "stop"


def test_a_spike_is_far_above_the_median() -> None:
    faults = Faults(FaultsConfig(spike="skip", spike_factor=4.0, window=5, min_steps=3))
    assert [faults.judge(1.0, norm) for norm in (1.0, 100.0, 2.0)] == [None] * 3, "too few steps are known"
    assert faults.judge(1.0, 8.1) == "spike" and faults.judge(1.0, 7.9) is None, "the median of 1, 100, 2 is 2"
    # It is not part of what comes after it; and the window moves on.
    assert [faults.judge(1.0, norm) for norm in (3.0, 3.0, 3.0, 3.0)] == [None] * 4 and faults.limit == 12.0
    assert faults.judge(float("nan"), 1.0) == faults.judge(1.0, float("inf")) == "not_finite"
    assert Faults(FaultsConfig()).judge(1.0, 1e30) is None, "without a policy nothing is a spike"


def test_norms_of_earlier_steps_are_read_whatever_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert _norms(path, 9) == []
    kept: list[dict[str, Any]] = [{"step": 1, "grad_norm": 2.0}, {"step": 2, "grad_norm": None}]
    kept += [{"step": 3, "grad_norm": 9.0, "skipped": True}, {"step": 4, "grad_norm": 3.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"step": 5, "gr')
    assert _norms(path, 9) == [2.0, 3.0] and _norms(path, 3) == [2.0]
