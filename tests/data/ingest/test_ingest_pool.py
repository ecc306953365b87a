"""Workers that crash, hang and eat memory: each costs its own file, and nothing else."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamed.data.ingest.engine import READERS, run
from megamed.data.ingest.options import Limits
from megamed.data.ingest.pool import Ended, Pool, Task
from megamed.data.store import VolumeStore
from tests.data.ingest.fake_reader import text

FAKE = ["tests.data.ingest.fake_reader:FakeReader"]
TOOLBOX = "tests.data.ingest.fake_toolbox:FakeToolbox"

# What a reader does, and the code with which its file is refused. A reader that merely forks or prints is none.
MISDEEDS = {
    "hang": "time-limit", "spin": "time-limit", "memory": "memory-limit", "crash": "decoder-crashed",
    "abort": "decoder-crashed", "killed": "memory-limit", "exit": "reader-failed", "leave": "decoder-crashed",
    "interrupt": "reader-failed", "odd": "reader-failed", "recursion": "reader-failed", "close": "decoder-crashed",
    "fork": None, "children": None, "print": None,
}  # fmt: skip
# Waiting for the limit of time once a step is enough.
CASES = [(step, what) for step in ("metadata", "group", "read") for what in MISDEEDS
         if what != ("hang" if step == "metadata" else "spin")]


def table(store: Path) -> list[dict[str, str]]:
    with open(store.with_name(f"{store.name}.private") / "quarantine.csv", newline="") as file:
        return list(csv.DictReader(file))


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which some containers leave, does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def collect(pool: Pool, *tasks: Task) -> list:
    for task in tasks:
        pool.submit(task)
    events = []
    while not pool.idle:
        events += pool.wait()
    return events


def test_misdeeds_cost_their_own_file_alone(tmp_path, capfd):
    source, store = tmp_path / "source", tmp_path / "store"
    source.mkdir()
    for series in "abcde":
        for i in range(4):
            (source / f"{series}{i}").write_text(text(series, i, value=i))
    for step, what in CASES:
        (source / f"{step}_{what}_0").write_text(text(f"{step} {what}", 0, **{step: what}))
        (source / f"{step}_{what}_1").write_text(text(f"{step} {what}", 1))
    (source / "group_forget_0").write_text(text("forget", 0, group="forget"))
    (source / "group_forget_1").write_text(text("forget", 1))
    (source / "read_refuse_0").write_text(text("refuse", 0, read="refuse"))
    (source / "read_refuse_1").write_text(text("refuse", 1))
    limits = Limits(seconds=1.5, num_bytes=512 << 20)
    outcome = run([source], store, readers=FAKE, limits=limits, workers=4, progress=False)

    codes = {Path(row["file"]).name: row["code"] for row in table(store)}
    expected = {f"{step}_{what}_{i}": MISDEEDS[what] for step, what in CASES for i in (0, 1)
                if MISDEEDS[what] and (step != "metadata" or i == 0)}
    expected |= {"group_forget_0": "not-grouped", "read_refuse_0": "truncated", "read_refuse_1": "series-refused"}
    assert codes == expected
    reasons = {Path(row["file"]).name: row["reason"] for row in table(store)}
    assert reasons["read_refuse_1"].endswith("/read_refuse_0: its pixel data ends early")
    # Five sound series; of a file that died at its header, the other of its series; those of harmless misdeeds.
    others = [what for step, what in CASES if step == "metadata" or MISDEEDS[what] is None]
    assert outcome.new_series == outcome.series == 5 + len(others) + 1
    assert sum(outcome.refused.values()) == len(expected)
    assert outcome.files == len(list(source.iterdir()))
    for record in VolumeStore(store).records():
        assert len(set(record.open()[0, :, 0, 0])) == record.info.shape[1] or record.info.shape[1] < 4
    # What decoders print, and what an exception says, may quote a header.
    shown = "".join(capfd.readouterr()) + "".join(reason for reason in reasons.values())
    assert "secret" not in shown and "12345" not in shown
    assert "with a secret: 12345" in (tmp_path / "store.private" / "errors.log").read_text()
    assert not list((tmp_path / "store.private" / "tmp").glob("*"))
    assert not list((store / ".unfinished").glob("*"))


def test_reports_that_eat_memory_cost_their_own_file_alone(tmp_path):
    (tmp_path / "source").mkdir()
    entry = '{"study": "1", "findings": "x"}'
    # As Python has it, an empty list is 56 bytes, so that these are more than the 256 MiB that any task may take.
    (tmp_path / "source" / "huge.json").write_text(f"[{entry}{', []' * 6_000_000}]")
    (tmp_path / "source" / "small.jsonl").write_text(entry)
    limits = Limits(num_bytes=256 << 20)
    for _ in range(2):
        outcome = run([tmp_path / "source"], tmp_path / "store", readers=FAKE, limits=limits, workers=1, progress=False)
        assert outcome.refused == {"memory-limit": 1, "no-study": 1} and outcome.kinds == {"refused": 1, "report": 1}


def test_workers_import_what_they_use():
    heavy = {"torch", "megatron", "pydicom", "nibabel", "PIL", "pyarrow", "nvidia.dali"}
    with Pool(1, TOOLBOX, {"greeting": "hi"}, 1 << 30) as pool:
        assert not heavy & set(collect(pool, Task("modules", None, 30, 1 << 28))[0].value)
    code = ("import sys\nfrom megamed.data.ingest.tasks import Toolbox, load_reader\n"
            f"print(*(load_reader(name).name for name in {list(READERS)!r}))\n"
            f"print(*(name for name in {sorted(heavy)!r} if name in sys.modules))\n"
            "import os; print(len(os.listdir('/proc/self/task')))")
    names, imported, threads = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    # A process with several threads must not fork.
    assert (names, imported, threads) == ("dicom nifti image", "PIL nibabel pydicom", "1")


def test_tasks_share_workers_and_memory():
    with Pool(3, TOOLBOX, {"greeting": "hi"}, num_bytes=100) as pool:
        began = time.monotonic()
        # Shares of 60 do not go together with each other; that of 1,000 is cut to what there is.
        events = collect(pool, *(Task("sleep", 0.2, 30, 1 << 28, share=share) for share in (60, 1000, 60, 20, 20)))
        assert sum(isinstance(event, Ended) and event.refusal is None for event in events) == 5
        assert time.monotonic() - began >= 0.6
        assert pool.peak_worker_bytes == 0  # nobody has died yet
        counted = collect(pool, Task("count", range(1000), 30, 1 << 28))
        assert [event.value[1] for event in counted[:-1]] == list(range(1000))


def test_whoever_is_killed_takes_workers_along(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from megamed.data.ingest.pool import Pool, Task
pool = Pool(2, {TOOLBOX!r}, {{"greeting": ""}}, 1 << 30)
for _ in range(2):
    pool.submit(Task("sleep", 1000.0, 1000, 1 << 28))
pids = []
while len(pids) < 2:
    pids += [event.value for event in pool.wait()]
print(*pids, pool._nursery.pid, flush=True)
while True:
    pool.wait()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(map(alive, pids))
        parent.kill()
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def test_a_pool_that_cannot_start_says_why():
    with Pool(1, f"{TOOLBOX}s", {}, 1) as pool, pytest.raises(RuntimeError, match="FakeToolboxs"):
        collect(pool, Task("count", [], 1, 1))
    with Pool(1, TOOLBOX, {"greeting": ""}, 1) as pool:
        collect(pool, Task("count", [1], 30, 1 << 28))
        assert pool._nursery is not None
        os.kill(pool._nursery.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="has ended"):
            while True:
                collect(pool, Task("count", [1], 30, 1 << 28))
