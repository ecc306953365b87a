"""Combinations of a sweep, and their numbers."""

import subprocess
import sys

import pytest

from tests.launch.command import ROOT


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools" / "sweep.py", *arguments], capture_output=True, text=True)


def test_each_value_with_each_other() -> None:
    settings = ("+exp=fmri", "optim.lr=1e-3,3e-4", "run.name=lr", "data.list=[1,2]", "x='a,b',\"c,d\"")
    lines = sweep(*settings).stdout.splitlines()
    assert len(lines) == 4
    assert lines[0] == "0 +exp=fmri optim.lr=1e-3 data.list=[1,2] x='a,b' run.name=lr-0"
    assert lines[3] == '3 +exp=fmri optim.lr=3e-4 data.list=[1,2] x="c,d" run.name=lr-3'
    one = sweep("--index", "3", *settings).stdout.splitlines()
    assert one == ["+exp=fmri", "optim.lr=3e-4", "data.list=[1,2]", 'x="c,d"', "run.name=lr-3"]


@pytest.mark.parametrize(("arguments", "says"), [
    (("--index", "2", "a=1,2"), "--index 2: there are 2 combinations; take --array=0-1"),
    (("a",), "a: is no setting; write key=value"),
])
def test_what_is_wrong(arguments: tuple[str, ...], says: str) -> None:
    done = sweep(*arguments)
    assert done.returncode == 2 and says in done.stderr
