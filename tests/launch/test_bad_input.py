"""What a user can get wrong before training begins: one line that names it and the mend, and nothing else."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.launch.command import SMALL, errors, run

RUN = Path(nibabel.__file__).parent / "tests" / "data" / "functional.nii"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with things that are no fMRI run, and no tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("empty", "letters", "words", "broken"):
        (folder / name).mkdir()
    (folder / "letters" / "report.txt").write_text("no finding")
    (folder / "broken" / "tokenizer.json").write_text('{"model": ')
    (folder / "text.nii").write_text("no image\n" * 500)
    (folder / "cut.nii").write_bytes(RUN.read_bytes()[:5000])
    nibabel.save(nibabel.Nifti1Image(np.full((4, 4, 4), 100, np.float32), np.eye(4)), folder / "anatomy.nii")
    (folder / "file").touch()
    return folder


def refused(tmp_path: Path, *args: str, **env: str) -> str:
    """The line that refuses these arguments."""
    log = tmp_path / f"log{len(list(tmp_path.iterdir()))}"
    code, output = run(log, *SMALL, f"run.dir={tmp_path}/runs", *args, env=env)
    lines = errors(output)
    assert code == 2, output
    assert len(lines) == 1 and "Traceback" not in output, output
    assert len(lines[0]) < 600
    return lines[0]


@pytest.mark.parametrize(("path", "says"), [
    ("nope.nii", ("nope.nii does not exist", "data.path")),
    ("nope/", ("nope does not exist", "data.path")),
    ("text.nii", ("text.nii cannot be read as NIfTI", ".nii.gz")),
    ("cut.nii", ("cut.nii is cut short or damaged", "copy")),
    ("anatomy.nii", ("anatomy.nii has 1 volume (4 x 4 x 4)", "at least 2 volumes")),
    ("empty", ("empty is empty", "DICOM")),
    ("letters", ("letters has no DICOM MR image (1 files, 0 of them DICOM)",)),
])
def test_data_that_is_no_run(path, says, inputs, tmp_path):
    line = refused(tmp_path, f"data.path={inputs}/{path}")
    assert all(text in line for text in says), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "secret.nii"
    path.write_bytes(RUN.read_bytes())
    path.chmod(0)
    assert "Permission denied" in refused(tmp_path, f"data.path={path}")


@pytest.mark.parametrize(("args", "says"), [
    (("data.pth=x",), ("data.pth: no such key; did you mean data.path?",)),
    (("model=internvl_tinny",), ("model=internvl_tinny: no such file", "did you mean model=internvl_tiny")),
    (("modle=internvl_tiny",), ("no such config group modle", "did you mean model=internvl_tiny?")),
    (("train.steps=many",), ("train.steps: expected an integer, not 'many'",)),
    (("train.dtype=fp16",), ("train.dtype: 'fp16' is no choice", "bf16")),
    (("run.resume=perhaps",), ("run.resume", "'ask', 'yes', 'no'")),
    (("train.steps",), ("train.steps: cannot be read as an override", "key=value")),
    (("--confg",), ("--confg: cannot be read as an override",)),
    (("data.path=",), ("data.path is ''", "NIfTI")),
    (("train.steps=0",), ("train.steps=0", "1 or more")),
    (("train.microbatches=0",), ("train.microbatches=0", "1 or more")),
    (("train.seed=-1",), ("train.seed=-1", "from 0")),
    (("optim.lr=-1",), ("optim.lr=-1.0", "above 0")),
    (("optim.min_lr=1",), ("optim.min_lr=1.0", "optim.lr = 0.002")),
    (("optim.decay_steps=3",), ("optim.decay_steps=3", "above the 20 steps of warm-up")),
    (("checkpoint.keep_last=-1",), ("checkpoint.keep_last=-1", "0 or more")),
    (("run.name=../other",), ("run.name='../other'", "one folder")),
    (("model.frames_per_pass=0",), ("model.frames_per_pass=0", "1 or more")),
    (("model.language.num_kv_heads=0",), ("model.language.num_kv_heads=0", "1 or more")),
    (("model.vision.patch_size=0",), ("model.vision.patch_size=0", "1 or more")),
    (("data.seq_length=64",), ("data.seq_length is 64, but a sample can have", "at least", "data.max_volumes")),
    (("model.language.num_heads=3",), ("model.language.num_kv_heads=2 does not divide model.language.num_heads=3",)),
    (("model.vision.num_heads=3",), ("model.vision.num_heads=3", "model.vision.hidden_size=64")),
    (("model.language.vocab_size=100",), ("262 tokens", "model.language.vocab_size=262")),
])
def test_a_value_that_cannot_be(args, says, tmp_path):
    line = refused(tmp_path, *args)
    assert all(text in line for text in says), line
    assert not list(tmp_path.glob("runs/*/*"))  # no settings, no metrics


@pytest.mark.parametrize(("args", "says"), [
    (("parallel.tensor=2",), ("tensor 2 x pipeline 1 x context 1 = 2 does not divide the world size 3",)),
    (("parallel.data=2",), ("x data 2 = 2, but the world size is 3", "start 2 ranks")),
    (("parallel.tensor=3",), ("parallel.tensor=3 does not divide model.language.num_heads=4",)),
    (("parallel.pipeline=3",), ("parallel.pipeline x parallel.virtual_pipeline=3 does not divide",)),
    ((), ("train.microbatches=2 does not divide by the 3 model replicas",)),
])
def test_a_layout_that_does_not_fit(args, says, tmp_path):
    """Said before the ranks meet: there is nobody at this address, and no time is lost."""
    line = refused(tmp_path, *args, RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert all(text in line for text in says), line


@pytest.mark.parametrize(("folder", "says"), [
    ("nowhere", ("has no tokenizer.json", "'bytes'")),
    ("words", ("has no tokenizer.json", "'bytes'")),
    ("broken", ("broken/tokenizer.json cannot be read as a tokenizer",)),
])
def test_a_tokenizer_that_is_none(folder, says, inputs, tmp_path):
    line = refused(tmp_path, f"data.tokenizer={inputs}/{folder}")
    assert all(text in line for text in says), line


@pytest.mark.parametrize("folder", ["/proc/nowhere", "FILE/runs"])
def test_a_run_folder_that_cannot_be_made(folder, inputs, tmp_path):
    line = refused(tmp_path, f"run.dir={folder.replace('FILE', str(inputs / 'file'))}")
    assert "cannot be made" in line and "run.dir" in line, line


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "runs" / "fmri" / "config.yaml").mkdir(parents=True)  # even root cannot write a file over a folder
    line = refused(tmp_path)
    assert "runs/fmri: cannot be written (Is a directory)" in line, line
    (tmp_path / "runs" / "fmri" / "config.yaml").rmdir()
    (tmp_path / "runs" / "fmri" / "metrics.jsonl").mkdir()
    line = refused(tmp_path)
    assert "metrics.jsonl: cannot be written" in line and "run.dir" in line, line
