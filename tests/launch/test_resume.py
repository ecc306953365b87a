"""Running the command again: it goes on, asks where somebody can answer, and overwrites nothing."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.launch.command import SMALL, Streams, errors, read_until, run, start, terminal, torchrun

COMMAND = (*SMALL, "train.steps=4", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps that is complete; copied, never changed."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = run(folder / "log", *COMMAND, f"run.dir={folder}/runs")
    assert code == 0, output
    return folder / "runs"


@pytest.fixture
def runs(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "runs"))


@pytest.fixture
def half_way(runs):
    """The same run when it had taken 2 of its 4 steps."""
    shutil.rmtree(runs / "fmri" / "checkpoints" / "step_00000004")
    return runs


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(folder)]


def again(runs: Path, *args: str) -> str:
    code, output = run(runs.parent / "log", *COMMAND, f"run.dir={runs}", *args)
    assert code == 0, output
    return output


def test_a_complete_run_says_so_and_evaluates(runs):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    output = again(runs, "eval.held_out=true", "eval.max_new_tokens=2", "eval.blank_control=false")
    assert "fmri is complete: it has taken 4 steps; to train on" in output and "train.steps=8" in output
    assert "held-out questions answered right" in output
    assert f"checkpoint   {runs}/fmri/checkpoints/step_00000004 (2 kept)" in output
    # What the run had written is as it was.
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: stamp for path, stamp in before.items() if path.is_file()
    }
    # A shorter train.steps than was taken is complete as well.
    assert "is complete: it has taken 4 steps" in again(runs, "train.steps=3")


def test_without_a_terminal_it_goes_on_and_says_so(half_way, finished):
    output = again(half_way)
    assert f"going on from {half_way}/fmri/checkpoints/step_00000002 (run.resume=no starts anew)" in output
    assert losses(half_way / "fmri") == losses(finished / "fmri")
    assert [line["step"] for line in metrics(half_way / "fmri")] == [1, 2, 3, 4]


def test_anew_takes_a_folder_with_a_number(runs, finished):
    before = {path: path.read_bytes() for path in (runs / "fmri").rglob("*") if path.is_file()}
    for number in (2, 3):
        output = again(runs, "run.resume=no", "train.steps=2")
        assert f"starting anew in {runs}/fmri-{number} (run.name=fmri-{number} goes on with it later)" in output
        assert [step for step, _ in losses(runs / f"fmri-{number}")] == [1, 2]
    assert {path: path.read_bytes() for path in before} == before
    output = again(runs, "run.name=fmri-2")
    assert f"going on from {runs}/fmri-2/checkpoints/step_00000002" in output
    assert len(losses(runs / "fmri-2")) == 4


def test_more_steps_go_on_along_the_longer_schedule(runs):
    settings = (runs / "fmri" / "config.yaml").read_text()
    output = again(runs, "train.steps=6", "optim.warmup_steps=1")
    assert "the learning rate decays over 6 steps, no longer over 4" in output
    assert "optim.decay_steps=4 keeps the earlier schedule" in output
    lines = metrics(runs / "fmri")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # What a run of 6 steps has there: cosine from 2e-3 to 1e-4 after 1 step of warm-up.
    for line in lines[4:]:
        share = (line["step"] - 1 - 1) / (6 - 1)
        assert line["lr"] == pytest.approx(1e-4 + 1.9e-3 * 0.5 * (1 + math.cos(math.pi * share)), rel=1e-6)
    # The earlier settings are kept beside the new ones.
    assert (runs / "fmri" / "config.until_step_00000004.yaml").read_text() == settings
    assert "steps: 6" in (runs / "fmri" / "config.yaml").read_text()


def test_the_earlier_schedule_can_be_kept(runs):
    output = again(runs, "train.steps=6", "optim.decay_steps=4", "optim.warmup_steps=3")
    assert "decays over" not in output
    assert [line["lr"] for line in metrics(runs / "fmri")[4:]] == pytest.approx([1e-4, 1e-4])


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    job = start(tmp_path / "log", *SMALL, f"run.dir={tmp_path}/runs", "train.steps=400", "checkpoint.every_steps=0")
    path = tmp_path / "runs" / "fmri" / "metrics.jsonl"
    while job.is_running() and not (path.exists() and path.read_text()):
        time.sleep(0.05)
    job.kill_tree()
    again(tmp_path / "runs", "train.steps=2")
    assert [step for step, _ in losses(tmp_path / "runs" / "fmri")] == [1, 2]
    assert not (tmp_path / "runs" / "fmri-2").exists()


@pytest.mark.parametrize(("answer", "goes_on"), [("y\n", True), ("\n", True), ("\x04", True), ("n\n", False)])
def test_at_a_terminal_it_asks(answer, goes_on, half_way, tmp_path):
    with terminal() as (person, path):
        job = start(tmp_path / "log", *COMMAND, f"run.dir={half_way}", "run.name=fmri",
                    streams=Streams(path, path, path))
        seen = read_until(person, "[Y/n] ")
        assert f"{half_way}/fmri/checkpoints/step_00000002 is from step 2. Go on from it?" in seen
        assert not (half_way / "fmri-2").exists()
        os.write(person, answer.encode())
        seen = read_until(person, "checkpoint   ")
        assert job.wait()[0] == 0
    place = half_way / ("fmri" if goes_on else "fmri-2")
    assert ("going on from" in seen) == goes_on and ("starting anew in" in seen) != goes_on
    assert [step for step, _ in losses(place)] == [1, 2, 3, 4]
    # The bar has the loss, the speed, the time that is left.
    assert "tokens/s" in seen and "loss " in seen and "<" in seen.partition("train:")[2]


@pytest.mark.parametrize("args", [("run.resume=yes",), ("run.resume=no",)])
def test_at_a_terminal_it_does_not_ask_what_it_was_told(args, half_way, tmp_path):
    with terminal() as (person, path):
        job = start(tmp_path / "log", *COMMAND, f"run.dir={half_way}", *args, streams=Streams(path, path, path))
        assert "[Y/n]" not in read_until(person, "checkpoint   ")
        assert job.wait()[0] == 0


def test_torchrun_at_a_terminal_asks_once(half_way, tmp_path):
    """Its ranks have the terminal as standard input, in sessions of their own."""
    with terminal() as (person, path), open(path, "r+b", buffering=0) as end:
        job = torchrun(tmp_path / "unused", *COMMAND, f"run.dir={half_way}", stdin=end, output=end)
        seen = read_until(person, "[Y/n] ")
        os.write(person, b"n\n")
        seen += read_until(person, "checkpoint   ")
        assert job.wait()[0] == 0
    assert seen.count("Go on from it?") == 1 and seen.count("starting anew in") == 1
    assert [step for step, _ in losses(half_way / "fmri-2")] == [1, 2, 3, 4]


def test_torchrun_in_the_background_does_not_take_what_is_typed(half_way, tmp_path):
    """As a shell with job control starts `torchrun ... &`: the terminal is there, another group has it."""
    with terminal() as (person, path), open(path, "r+b", buffering=0) as end:
        job = torchrun(tmp_path / "unused", *COMMAND, f"run.dir={half_way}", stdin=end, output=end, background=True)
        seen = read_until(person, "checkpoint   ")
        assert job.wait()[0] == 0
    assert "going on from" in seen and "[Y/n]" not in seen


@pytest.mark.parametrize("streams", [
    Streams(None, "LOG", "LOG"), Streams(os.devnull, None, "LOG"), Streams(os.devnull, "LOG", None),
    Streams(None, None, None),
])
def test_closed_streams(streams, half_way, tmp_path):
    paths = [str(tmp_path / "log") if p == "LOG" else p for p in (streams.stdin, streams.stdout, streams.stderr)]
    job = start(tmp_path / "log", *COMMAND, f"run.dir={half_way}", streams=Streams(*paths))
    code, output = job.wait()
    assert code == 0 and "Traceback" not in output, output
    assert len(losses(half_way / "fmri")) == 4


def _cut(path: Path, length: int) -> tuple[str, str]:
    os.truncate(path, length)
    return path.name, "is damaged: its checksum is another"


def _replace(path: Path, text: str) -> tuple[str, str]:
    path.write_text(text)
    return path.name, "is damaged: its checksum is another"


def _remove(path: Path) -> tuple[str, str]:
    path.unlink()
    return path.name, "is missing"


def _add(path: Path) -> tuple[str, str]:
    path.write_text("")
    return path.name, "is not in SHA256SUMS"


DAMAGE = {
    "no weights": lambda folder: _remove(folder / "__0_0.distcp"),
    "weights cut short": lambda folder: _cut(folder / "__0_0.distcp", 100_000),
    "bits turned": lambda folder: _turn_bits(folder / "__0_0.distcp"),
    "no metadata": lambda folder: _remove(folder / ".metadata"),
    "metadata cut short": lambda folder: _cut(folder / ".metadata", 100),
    "common.pt is something else": lambda folder: _replace(folder / "common.pt", "garbage\n"),
    "card cut short": lambda folder: _cut(folder / "megamed.json", 100),
    "card of something else": lambda folder: _replace(folder / "megamed.json", "{}"),
    "no list": lambda folder: (_remove(folder / "SHA256SUMS")[0], "cannot be read (No such file or directory)"),
    "list cut short": lambda folder: (_cut(folder / "SHA256SUMS", 100)[0], "is damaged"),
    "a file too many": lambda folder: _add(folder / "more"),
}


def _turn_bits(path: Path) -> tuple[str, str]:
    data = bytearray(path.read_bytes())
    for index in range(len(data) // 4, len(data) // 2):
        data[index] ^= 0xFF
    path.write_bytes(data)
    return path.name, "is damaged: its checksum is another"


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(kind, runs, finished):
    damaged = runs / "fmri" / "checkpoints" / "step_00000004"
    path, says = DAMAGE[kind](damaged)
    output = again(runs)
    line = next(line for line in output.splitlines() if "WARNING" in line and str(damaged) in line)
    assert f"{damaged}: {path} {says}" in line and "is kept as step_00000004.damaged, and the" in line
    assert losses(runs / "fmri") == losses(finished / "fmri")
    names = sorted(path.name for path in damaged.parent.iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000004.damaged"]


def test_if_all_are_damaged_it_says_so(runs):
    for step in (2, 4):
        DAMAGE["bits turned"](runs / "fmri" / "checkpoints" / f"step_{step:08d}")
    code, output = run(runs.parent / "log", *COMMAND, f"run.dir={runs}")
    assert code == 2 and "Traceback" not in output, output
    assert len(errors(output)) == 1 and "no checkpoint is whole; those that are damaged are named" in errors(output)[0]
    assert output.count("is damaged: its checksum is another") == 2


def test_without_verification_what_torch_cannot_read_is_named(runs):
    damaged = runs / "fmri" / "checkpoints" / "step_00000004"
    (damaged / "__0_0.distcp").unlink()
    code, output = run(runs.parent / "log", *COMMAND, f"run.dir={runs}", "checkpoint.verify=false")
    assert code == 2 and "Traceback" not in output and len(errors(output)) == 1, output
    assert f"{damaged}: " in errors(output)[0] and "move that folder away" in errors(output)[0], output


def test_a_step_that_is_saved_again_takes_the_old_ones_place(runs, finished):
    """A checkpoint without its card is none, and the run goes back to the one before it."""
    card = runs / "fmri" / "checkpoints" / "step_00000004" / "megamed.json"
    content = json.loads(card.read_text())
    card.unlink()
    assert "step_00000002" in again(runs)
    assert json.loads(card.read_text()) == content
    assert "is complete" in again(runs)
    assert sorted(path.name for path in card.parents[1].iterdir()) == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize(("args", "says"), [
    (("model.language.num_layers=1",), ("of another model (model.language.num_layers was 2, is now 1)", "run.name")),
    (("optim.distributed=false",), ("optim.distributed=true", "run.name")),
])
def test_a_checkpoint_of_another_run(args, says, runs):
    code, output = run(runs.parent / "log", *COMMAND, f"run.dir={runs}", *args)
    assert code == 2 and "Traceback" not in output, output
    assert len(errors(output)) == 1 and all(text in errors(output)[0] for text in says), output


def test_another_dtype_goes_on(half_way):
    """The optimizer's fp32 weights are in the checkpoint, whatever the model's type is."""
    again(half_way, "train.dtype=bf16")
    assert len(losses(half_way / "fmri")) == 4
