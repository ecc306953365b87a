"""The volume store: exact voxels, one index for one content, whole after a kill, one writer, damage named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megamed.data.readers import Identity, SeriesPlan
from megamed.data.series import Series, SeriesInfo
from megamed.data.store import StoreWriter, VolumeStore, series_id, write_series
from megamed.utils import UserError
from tests.data.store import stores
from tests.data.store.stores import PSEUDONYMS, add, ingest, name, tree, volume


def arrays() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    limits = [draw.integers(np.iinfo(t).min, np.iinfo(t).max, (2, 3, 5, 7), dtype=t, endpoint=True)
              for t in ("uint8", "int16", "uint16")]
    for voxels in limits:
        voxels.flat[:2] = np.iinfo(voxels.dtype).min, np.iinfo(voxels.dtype).max
    real = draw.normal(size=(1, 3, 5, 7)).astype(np.float32)
    colour = draw.integers(0, 256, (1, 1, 5, 7, 3), dtype=np.uint8)
    turned = limits[1].transpose(0, 1, 3, 2)[:, ::-1, :, ::-1]
    return [*limits, real, colour, turned, limits[1].astype(">i2")]


@pytest.mark.parametrize("number", range(7))
def test_voxels_come_back_to_the_last_bit(tmp_path, number):
    voxels = arrays()[number]
    info = SeriesInfo(shape=voxels.shape, dtype=voxels.dtype.name, notes=("a",), windows=((40.0, 400.0),),
                      percentiles={"1.0": 0.1}, repetition_time_s=0.72,
                      affine=tuple(map(tuple, np.diag([0.1, 2.0, 3.0, 1.0]).tolist())))
    store = VolumeStore.create(tmp_path / "store")
    with StoreWriter(store) as writer:
        record = add(writer, store, 1, Series(voxels, info))
    found = VolumeStore(tmp_path / "store").record(name(1))
    assert found.folder == record.folder == tmp_path / "store" / "series" / name(1)[:2] / name(1)
    assert found.to_json() == record.to_json() == (found.folder / "series.json").read_text()
    assert len(found.info.provenance) == 64
    assert found.info == SeriesInfo(**{**info.__dict__, "provenance": found.info.provenance})
    np.testing.assert_array_equal(found.open(), voxels)
    assert found.open().dtype == voxels.dtype.newbyteorder("<") and isinstance(found.open(), np.memmap)
    raw = found.voxels_path.read_bytes()
    assert raw[:8] == b"\x93NUMPY\x01\x00" and found.open().offset % 64 == 0
    assert raw[found.open().offset :] == np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("<")).tobytes()
    assert found.num_bytes == voxels.nbytes


def test_one_index_for_one_content(tmp_path):
    ingest(tmp_path / "a", {1: 2, 2: 5, 3: 3})
    ingest(tmp_path / "b", {3: 3, 1: 2})
    before = tree(tmp_path / "b")
    ingest(tmp_path / "b", {1: 2})  # is there: nothing changes
    assert tree(tmp_path / "b") == before
    ingest(tmp_path / "b", {2: 4})
    ingest(tmp_path / "b", {2: 5})  # one more slice arrived
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    store = VolumeStore(tmp_path / "a")
    table = pq.read_table(tmp_path / "a" / "index.parquet").to_pydict()
    assert table["series"] == sorted(map(name, (1, 2, 3))) == [record.series for record in store.records()]
    assert table["num_slices"][table["series"].index(name(2))] == 5
    # Read from the folders it is the same.
    (tmp_path / "b" / "index.parquet").unlink()
    scanned = VolumeStore(tmp_path / "b")
    assert [r.to_json() for r in scanned.records()] == [r.to_json() for r in store.records()]
    assert scanned.index.table.equals(store.index.table)


def test_a_store_from_before_there_were_keywords(tmp_path, caplog):
    ingest(tmp_path, {1: 2, 2: 2})
    now = VolumeStore(tmp_path)
    for record in now.records():
        values = json.loads(record.to_json())
        del values["info"]["keywords"]
        (record.folder / "series.json").write_text(json.dumps(values))
    columns = now.index.table.drop_columns("keywords").to_pydict()
    columns["info"] = [json.dumps({k: v for k, v in json.loads(x).items() if k != "keywords"}) for x in columns["info"]]
    first = now.index.table.schema.remove(now.index.table.schema.get_field_index("keywords"))
    pq.write_table(pa.table(columns, first.with_metadata({b"megamed-index": b"1"})), tmp_path / "index.parquet")
    old = VolumeStore(tmp_path)
    # Made unreadable: the index alone is read, not the folders.
    shelf = tmp_path / "series"
    shelf.rename(tmp_path / "away")
    assert [r.info for r in old.records()] == [r.info for r in now.records()]
    assert VolumeStore(tmp_path).index.table["keywords"].to_pylist() == [[], []]
    (tmp_path / "away").rename(shelf)
    assert old.verify() == [] and not caplog.records
    ingest(tmp_path, {3: 2})
    assert pq.read_table(tmp_path / "index.parquet")["keywords"].to_pylist() == [[], [], []]


def test_series_are_found_by_name_and_by_study(tmp_path):
    store = VolumeStore.create(tmp_path)
    assert len(store) == 0 and list(store.records()) == [] and name(1) not in store and store.of_study("one") == []
    store = VolumeStore(tmp_path)
    with StoreWriter(store) as writer:
        for number, study in enumerate(["one", "two", "one", ""]):
            add(writer, store, number, volume(number), study)
    assert len(store) == 4 and name(3) in store and "" not in store and "../.." not in store and "zz" not in store
    assert [r.series for r in store.of_study("one")] == sorted([name(0), name(2)])
    assert [r.series for r in store.of_study("two")] == [name(1)] and store.of_study("t") == []
    assert store.record(name(2)).patient == "patient2"
    with pytest.raises(UserError, match="has no series 'zz'; ingest it"):
        store.record("zz")


def test_a_part_has_a_name_of_its_own():
    identity = Identity(series=name(1))
    names = {series_id(SeriesPlan("dicom", identity, part, (), 1)) for part in ("", "echo 1", "echo 2")}
    assert len(names) == 3 and name(1) in names and all(len(n) == 20 and int(n, 16) >= 0 for n in names)


def test_killed_before_any_step_and_finished_it_is_the_same_store(tmp_path):
    """The ingest replaces one series, adds one, and keeps one."""
    start, work = {1: 2, 2: 2}, {1: 3, 3: 2, 2: 2}
    ingest(tmp_path / "start", start)
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    ingest(tmp_path / "whole", work)
    whole = tree(tmp_path / "whole")
    command = [sys.executable, "-m", stores.__name__, tmp_path / "start", tmp_path / "killed", json.dumps(work)]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[3])
    num_kills, num_stale = len(list((tmp_path / "killed").iterdir())) - 1, 0
    for number in range(num_kills):
        root = tmp_path / "killed" / str(number)
        store = VolumeStore(root)
        num_stale += not (root / "index.parquet").exists()
        assert store.verify() == []
        found = {record.series: record for record in store.records()}
        # The one that is being replaced may be missing for the time between two renames.
        assert name(2) in found and {name(1), name(2), name(3)} >= set(found)
        for record in found.values():
            slices = record.open().shape[1]
            number = [name(n) for n in range(4)].index(record.series)
            assert slices in (start.get(number), work.get(number))
            np.testing.assert_array_equal(record.open(), volume(number, slices).voxels_TSHW)
        ingest(root, work)
        assert tree(root) == whole
    assert tree(tmp_path / "killed" / str(num_kills)) == whole
    # Blocks of voxels, folders, renames, sums on the disk and the index are all among the steps.
    assert num_kills > 40 and num_stale > 20


def test_new_series_that_a_killed_replacement_left_without_a_place_is_put_back(tmp_path):
    ingest(tmp_path, {1: 2})
    before = tree(tmp_path)
    place = tmp_path / "series" / name(1)[:2] / name(1)
    place.rename(tmp_path / ".unfinished" / f"{name(1)}.replaced")
    StoreWriter(VolumeStore(tmp_path)).close()
    assert tree(tmp_path) == before


def test_what_a_kill_left_of_store_json_is_removed(tmp_path):
    (tmp_path / ".store.json.123").write_bytes(b"")
    with StoreWriter(VolumeStore.create(tmp_path)):
        pass
    assert not list(tmp_path.glob(".store.json*"))


def test_one_writer_and_many_readers(tmp_path):
    store = VolumeStore.create(tmp_path)
    with StoreWriter(store) as writer:
        old = add(writer, store, 1, volume(1, 2)).open()
        with pytest.raises(UserError, match=r"is being written by process \d+ on .*; wait until it is done"):
            StoreWriter(VolumeStore.create(tmp_path))
        add(writer, store, 1, volume(1, 4))
        # Who has the old voxels open keeps them.
        np.testing.assert_array_equal(old, volume(1, 2).voxels_TSHW)
        assert VolumeStore(tmp_path).record(name(1)).info.shape[1] == 4
    # The lock is free, and the store does not say where it was made.
    StoreWriter(store).close()
    assert (tmp_path / ".lock").read_bytes() == b""


def test_what_is_not_the_series_is_not_written(tmp_path):
    for series in (Series(volume(1).voxels_TSHW, SeriesInfo(shape=(1, 2, 3, 5))),
                   Series(volume(1).voxels_TSHW.astype(np.float64), SeriesInfo(shape=(1, 2, 3, 4), dtype="float64"))):
        with pytest.raises(ValueError):
            write_series(tmp_path, name(1), Identity(), series, PSEUDONYMS)
    with pytest.raises(ValueError):
        write_series(tmp_path, "../x", Identity(), volume(1), PSEUDONYMS)
    assert list(tmp_path.iterdir()) == []


def flip_last_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def other_shape(path: Path) -> None:
    np.save(path, np.zeros((1, 2, 3, 5), np.int16))


def change(key, value):
    def apply(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    return apply


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(("file", "damage", "reason"), [
    ("voxels.npy", Path.unlink, "voxels.npy is missing"),
    ("voxels.npy", cut, "voxels.npy cannot be read"),
    ("voxels.npy", lambda path: path.write_bytes(b"junk"), "voxels.npy cannot be read"),
    ("voxels.npy", lambda path: path.write_bytes(b""), "voxels.npy cannot be read"),
    ("voxels.npy", other_shape, "voxels.npy is not what series.json says"),
    ("voxels.npy", flip_last_bit, "the sum of the voxels is wrong"),
    ("series.json", Path.unlink, "series.json is missing"),
    ("series.json", cut, "series.json cannot be read"),
    ("series.json", lambda path: path.write_text("[]"), "series.json cannot be read"),
    ("series.json", change("series", "0" * 20), "series.json is of another series"),
    ("series.json", change("patient", 1), "series.json cannot be read"),
    ("series.json", change("info", {"windows": 3, "dtype": "object"}), "series.json cannot be read"),
    ("series.json", change("schema", 2), "has schema 2, this megamed reads up to 1; use the megamed that wrote"),
])
def test_damage_is_named_with_its_mend(tmp_path, file, damage, reason):
    ingest(tmp_path, {1: 2, 2: 2})
    folder = tmp_path / "series" / name(1)[:2] / name(1)
    seen: list[tuple[int, int]] = []
    assert VolumeStore(tmp_path).verify(lambda *told: seen.append(told)) == []
    assert seen == [(48, 2), (48, 2)]  # bytes of the voxels; series in all
    damage(folder / file)
    [fault] = VolumeStore(tmp_path).verify()
    assert fault.series == name(1) and str(folder) in fault.reason
    assert reason in f"{fault.reason}; {fault.mend}"
    if "later" not in fault.mend:
        assert fault.mend == "delete this folder and ingest its source again"
    if "sum" in reason:
        return  # training does not read all of a file to add it up
    (tmp_path / "index.parquet").unlink()
    with pytest.raises(UserError) as caught:
        VolumeStore(tmp_path).record(name(1)).open()
    assert str(folder) in str(caught.value) and reason in str(caught.value)
    # The mend mends.
    shutil.rmtree(folder)
    ingest(tmp_path, {1: 2})
    assert VolumeStore(tmp_path).verify() == [] and len(VolumeStore(tmp_path)) == 2


def test_voxels_that_are_missing_are_written_again_by_an_ingest(tmp_path):
    ingest(tmp_path, {1: 2})
    before = tree(tmp_path)
    (tmp_path / "series" / name(1)[:2] / name(1) / "voxels.npy").unlink()
    ingest(tmp_path, {1: 2})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b"PAR1 no more"),
    lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata({"megamed-index": "0"}), path),
    lambda path: pq.write_table(pq.read_table(path).drop_columns("study"), path),
])
def test_an_index_that_cannot_be_used_is_passed_over_and_rebuilt(tmp_path, damage):
    ingest(tmp_path, {1: 2, 2: 3})
    before = tree(tmp_path)
    damage(tmp_path / "index.parquet")
    assert [r.series for r in VolumeStore(tmp_path).records()] == sorted([name(1), name(2)])
    ingest(tmp_path, {})
    assert tree(tmp_path) == before


def test_an_index_that_is_not_true_is_found_and_rebuilt(tmp_path):
    ingest(tmp_path, {1: 2, 2: 3})
    shutil.rmtree(tmp_path / "series" / name(1)[:2] / name(1))
    [fault] = VolumeStore(tmp_path).verify()
    assert fault.reason == "index.parquet lacks 0 series and lists 1 that are not there"
    with pytest.raises(UserError, match=r"voxels.npy is missing"):
        VolumeStore(tmp_path).record(name(1)).open()
    ingest(tmp_path, {})
    assert [r.series for r in VolumeStore(tmp_path).records()] == [name(2)]


@pytest.mark.parametrize(("files", "reason"), [
    ({}, "is not a volume store"),
    ({"store.json": '{"format": "megamed-volume-store", "version": 2}'}, "of version 2, this megamed reads up to 1"),
    ({"store.json": '{"format": "zarr", "version": 1}'}, "is not a volume store"),
    ({"store.json": '{"format": "meg'}, "cannot be read; it should be"),
    ({"store.json": "[]"}, "cannot be read; it should be"),
])
def test_what_is_no_store_of_this_version_is_refused(tmp_path, files, reason):
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=reason):
        VolumeStore(tmp_path)
    if files:
        with pytest.raises(UserError, match=reason):
            VolumeStore.create(tmp_path)


def test_no_store_is_made_over_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="neither empty nor a volume store; give a new folder"):
        VolumeStore.create(tmp_path)
    with pytest.raises(UserError, match="is a file; give the folder"):
        VolumeStore.create(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="is not a volume store"):
        VolumeStore(tmp_path / "notes.txt" / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_store_says_how_it_was_deidentified_and_stays_so(tmp_path):
    shifted, dropped = ({"method": "by whitelist", "dates": dates} for dates in ("shifted", "dropped"))
    ingest(tmp_path, {1: 2})
    VolumeStore(tmp_path).declare(shifted, "one key")
    VolumeStore(tmp_path).declare(shifted, "one key")
    said = json.loads((tmp_path / "store.json").read_text())
    assert said == {"format": "megamed-volume-store", "version": 1, "deidentified": shifted, "key": "one key"}
    with pytest.raises(UserError, match="in another way; ingest with --dates shift, or make a new store"):
        VolumeStore(tmp_path).declare(dropped, "another")
    with pytest.raises(UserError, match="in another way; make a new store"):
        VolumeStore(tmp_path).declare({**shifted, "method": "by hand"}, "one key")
    with pytest.raises(UserError, match="with another project key; give that one by --key FILE, or make a new store"):
        VolumeStore(tmp_path).declare(shifted, "another")
    assert json.loads((tmp_path / "store.json").read_text()) == said and VolumeStore(tmp_path).verify() == []
