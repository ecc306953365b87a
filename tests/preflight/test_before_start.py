"""A training job asks preflight first: one that cannot fit ends before it allocates anything."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from megamed.config import compose, load
from megamed.preflight import before, check_before_start
from megamed.train import JobConfig
from megamed.utils import UserError
from tools.preflight import CONF

SMALL = ("+exp=fmri", "data.seq_length=256", "train.microbatches=2", "model.language.num_layers=2")


def config(*overrides: str) -> JobConfig:
    return load(JobConfig, compose(CONF, "pretrain", [*SMALL, *overrides]))


def test_a_job_that_cannot_fit_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = ("run.preflight=yes", f"run.dir={tmp_path}")
    monkeypatch.setattr(before, "_memory_gib", lambda: 6.001)  # 6 GiB are set aside
    with pytest.raises(UserError, match=r"^preflight: does not fit: rank 0 takes .*run.preflight=no starts it"):
        check_before_start(config(*wanted), None, [*SMALL, *wanted])
    monkeypatch.setattr(before, "_memory_gib", lambda: 12.0)
    check_before_start(config(*wanted), None, [*SMALL, *wanted])


def test_who_does_not_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started: list[Any] = []

    def run(command: Any, **_: Any) -> Any:
        started.append(command)
        return subprocess.CompletedProcess(command, 3, "", "something else")

    monkeypatch.setattr(subprocess, "run", run)
    check_before_start(config(f"run.dir={tmp_path}"), None, SMALL)  # auto: there is no GPU
    check_before_start(config("run.preflight=no"), None, SMALL)
    asks = ("run.preflight=yes", f"run.dir={tmp_path}")
    monkeypatch.setenv("RANK", "1")
    check_before_start(config(*asks), None, SMALL)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    check_before_start(config(*asks), None, SMALL)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert not started
    # A preflight that breaks down is no reason not to train.
    check_before_start(config(*asks), None, SMALL)
    assert len(started) == 1 and "ended with code 3 and without a verdict: something else" in caplog.text
    # A run that goes on has shown that it fits.
    kept = tmp_path / "fmri" / "checkpoints" / "step_00000001"
    kept.mkdir(parents=True)
    (kept / "megamed.json").write_text("{}")
    check_before_start(config(*asks), None, SMALL)
    assert len(started) == 1
