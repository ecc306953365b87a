"""A checkpoint that is written parameter by parameter is there whole or not at all, whatever happens meanwhile."""

import contextlib
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamed.checkpoint import aside, read_card, rewrite
from megamed.checkpoint.rewrite import Piece, write_weights
from megamed.checkpoint.sums import find_damage
from megamed.checkpoint.weights import Weights
from megamed.models.vlm import VLMConfig
from megamed.utils import UserError
from tests.small_disk import mounted

NAMES = [f"language.layer{i}.weight" for i in range(6)]
SHAPE = (256, 1024)  # a megabyte
CARD = rewrite.make_card(VLMConfig(), {})


def pieces() -> list[Piece | str]:
    """Each parameter in two halves, as the gate and the other half of an MLP are."""
    found: list[Piece | str] = ["language.layer0._extra_state/shard_0_1"]
    for name in NAMES:
        found += [Piece(name, (), (start, 0), (128, 1024), SHAPE, torch.float32) for start in (0, 128)]
    return found


def made(name: str) -> Tensor:
    return torch.full(SHAPE, float(NAMES.index(name))) + torch.arange(256.0)[:, None]


def write(target: Path, make: Any = lambda name, stack: made(name)) -> int:
    return write_weights(target, pieces(), make, CARD, {"moe.yaml": "top_k: 2\n"})


def check(target: Path) -> None:
    weights = Weights(target)
    assert list(weights) == NAMES and all(weights.read(name).equal(made(name)) for name in NAMES)
    assert read_card(target)["weights_only"] and (target / "moe.yaml").read_text() == "top_k: 2\n"
    assert find_damage(target) is None
    # Whoever wrote it, and where, is his own affair.
    assert str(target.parent).encode() not in (target / ".metadata").read_bytes()


def test_one_parameter_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def make(name: str, stack: tuple[int, ...]) -> Tensor:
        nonlocal most
        parameter = made(name)
        alive.add(parameter)
        most = max(most, len(alive))
        return parameter

    assert write(tmp_path / "new", make) == len(NAMES) * 2**20
    check(tmp_path / "new")
    assert most == 1


def write_and_die(target: str, at: int) -> None:
    """Killed while a parameter is made."""

    def make(name: str, stack: tuple[int, ...]) -> Tensor:
        if NAMES.index(name) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(name)

    write(Path(target), make)


@pytest.mark.parametrize("there_before", [False, True])
def test_a_kill_leaves_nothing_under_the_name_or_what_was_there(there_before: bool, ranks: Any, tmp_path: Path) -> None:
    target = tmp_path / "new"
    if there_before:
        write(target)
    with pytest.raises(AssertionError, match="the process died"):
        ranks.run(write_and_die, 1, str(target), 4)
    assert target.exists() == there_before and (tmp_path / "new.unfinished").exists()
    if there_before:
        check(target)
    write(target)
    check(target)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def write_in_files(target: str, identity: str, dies_at: int | None) -> list[str]:
    """Two parameters to a file; the names of those that were made."""
    rewrite._FILE_BYTES = 2 * 2**20
    names = []

    def make(name: str, stack: tuple[int, ...]) -> Tensor:
        if NAMES.index(name) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        names.append(name)
        return made(name)

    write_weights(Path(target), pieces(), make, CARD, {"moe.yaml": "top_k: 2\n"}, identity)
    return names


def test_after_a_kill_the_same_writing_goes_on(ranks: Any, tmp_path: Path) -> None:
    target = tmp_path / "new"
    with pytest.raises(AssertionError, match="the process died"):
        ranks.run(write_in_files, 1, str(target), "a", 5)
    assert not target.exists()
    assert ranks.run(write_in_files, 1, str(target), "a", None)[0] == NAMES[4:], "two files were finished"
    check(target)
    assert not [path.name for path in target.iterdir() if path.name.startswith(("written", "identity"))]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_after_a_kill_another_writing_begins_anew(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the process died"):
        ranks.run(write_in_files, 1, str(tmp_path / "new"), "a", 5)
    assert ranks.run(write_in_files, 1, str(tmp_path / "new"), "b", None)[0] == NAMES
    check(tmp_path / "new")


def test_a_kill_between_the_renames_is_mended(tmp_path: Path) -> None:
    target = tmp_path / "new"
    write(target)
    target.rename(tmp_path / "new.discarded")

    def fail(name: str, stack: tuple[int, ...]) -> Tensor:
        raise UserError("the source is damaged")

    with pytest.raises(UserError, match="the source is damaged"):
        write(target, fail)
    check(target)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_disk_that_fills_up_is_named_and_what_was_written_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(mounted(tmp_path / "disk", "4m"))
        with pytest.raises(UserError, match=r"takes 7 MiB, and 4 MiB are free there; free space"):
            write(disk / "new")
        monkeypatch.setattr(aside, "_need_space", lambda target, num_bytes: None)  # something else fills it meanwhile
        with pytest.raises(UserError, match=r"new: cannot be written \(.* MiB free there\); free space, or"):
            write(disk / "new")
        assert not list(disk.iterdir())


def test_a_defect_is_no_full_disk(tmp_path: Path) -> None:
    def fail(name: str, stack: tuple[int, ...]) -> Tensor:
        return torch.ones(2, 3) @ torch.ones(2, 3)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        write(tmp_path / "new", fail)
    assert not list(tmp_path.iterdir())
