"""A flipped byte in any file of a checkpoint is noticed, and so is one in the list of checksums itself."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from megamed.checkpoint.sums import SUMS, find_damage, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step"
    (folder / "hf").mkdir(parents=True)
    draw = random.Random(0)
    sizes = {"__0_0.distcp": 5000, "__1_0.distcp": 3000, ".metadata": 200, "hf/a b.json": 90, "empty": 0}
    for name, size in sizes.items():
        (folder / name).write_bytes(draw.randbytes(size))
    write_sums(folder, {})
    return folder


def test_every_bit_of_the_list_and_every_byte_of_the_files(folder: Path) -> None:
    assert find_damage(folder) is None
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        masks = [1 << bit for bit in range(8)] if path.name == SUMS else [0xFF]
        for place in range(0, len(content), 1 if path.name == SUMS else 37):
            for mask in masks:
                path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
                assert find_damage(folder), (path.name, place, mask)
        path.write_bytes(content)
    assert find_damage(folder) is None


def test_the_files_are_shared_and_the_list_is_everybodys(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[::-1])
    found = [find_damage(folder, part, 3) for part in range(3)]
    assert [problem for problem in found if problem] == ["__1_0.distcp is damaged: its checksum is another"]
    path.unlink()
    assert [find_damage(folder, part, 3) for part in range(3)] == ["__1_0.distcp is missing"] * 3


def test_what_is_known_is_not_read_again(folder: Path) -> None:
    (folder / SUMS).unlink()
    write_sums(folder, {"__0_0.distcp": "0" * 64})
    assert find_damage(folder) == "__0_0.distcp is damaged: its checksum is another"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum, of the GNU tools")
def test_the_systems_own_tool_reads_it(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", SUMS]
    assert subprocess.run(command, cwd=folder).returncode == 0
    (folder / ".metadata").write_bytes(b"")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1
