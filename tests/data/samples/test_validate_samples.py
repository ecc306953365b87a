"""tools/validate_samples.py: every fault with file, line, key and mend; not a word of the samples."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Identity
from megamed.data.series import Series, SeriesInfo
from megamed.data.store import StoreWriter, VolumeStore, write_series

TOOL = Path(__file__).resolve().parents[3] / "tools" / "validate_samples.py"
PSEUDONYMS = Pseudonyms(bytes(32))
CT, RUN = (PSEUDONYMS.of("series", name) for name in ("ct", "run"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A CT of 5 slices 2 mm apart, and a run of 4 volumes 1.5 s apart."""
    store = VolumeStore.create(tmp_path_factory.mktemp("samples") / "store")
    with StoreWriter(store) as writer:
        for name, kind, shape in ((CT, "volume", (1, 5, 4, 4)), (RUN, "run", (4, 1, 4, 4))):
            info = SeriesInfo(modality="CT", kind=kind, plane="axial", shape=shape, spacing_mm=(1.0, 1.0, 2.0),
                              repetition_time_s=1.5 if kind == "run" else None)
            series = Series(np.zeros(shape, np.int16), info)
            writer.commit(write_series(store.root, name, Identity(), series, PSEUDONYMS))
    return store.root


def run(capsys, *args):
    """The tool's exit code and what it prints."""
    argv, sys.argv = sys.argv, [str(TOOL), *map(str, args)]
    try:
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = argv
    output = capsys.readouterr()
    return caught.value.code, output.out + output.err


def talk(question="SECRET?", answer="SECRET.", **keys):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


def test_a_good_file_passes(tmp_path, store, capsys):
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "film").mkdir()
    rows = [
        talk("<study>", "x", studies=[
            {"series": CT, "windows": ["lung", "bone", [40, 80]], "frames": {"range_mm": [8, 99]}}]),
        talk("<study>?", "x", studies=[{"series": RUN, "frames": {"range_s": [4.5, 9]}}]),
        talk("<image><ref-object>?", "<bbox>", images=["a.png"], objects={"ref": ["x"], "bbox": [[0, 0, 40, 30]]}),
        talk("", "x", images=["a.png"], objects={"bbox": [[0.5, 1]], "bbox_type": "norm1"}),
        talk("?", "x", videos=["film", ["a.png", str(tmp_path / "a.png")]], rejected_response="y"),
        {"messages": [{"role": "user", "content": "to be classified"}], "label": 3},
        {"messages": [{"role": "assistant", "content": "text"}]},
    ]
    path = tmp_path / "good.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    code, output = run(capsys, path, "--store", store)
    assert code == 0, output
    assert output == f"{path}: 13 lines, 0 problems\n"


def test_every_fault_is_found_and_nothing_of_the_text_is_shown(tmp_path, store, capsys):
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    boxes = {"images": ["a.png"],
             "objects": {"bbox": [[0, 0, 41, 30], [9, 9, 3, 12], [1, 2]], "image_id": [0, 0, 1]}}
    lines = [
        (json.dumps(talk()), []),
        ("", []),
        (json.dumps(talk(), indent=None, separators=(" , ", ":")), ["is the same as line 1"]),
        ("{SECRET", ["is no JSON"]),
        (json.dumps({"messages": [{"role": "user", "content": "SECRET"}]}), ["messages[0].role: is user at the end"]),
        (json.dumps(talk("", " ")), ["messages[0].content: is empty", "messages[1].content: is empty"]),
        (json.dumps(talk("1", rejected_response="SECRET. ")), ["rejected_response: is the same as the answer"]),
        (json.dumps(talk("2", images=["SECRET.png"], videos=["SECRET.mp4", ["a.png", "SECRET"]])),
         ["images[0]: there is no such file", "videos[0]: there is", "videos[1][1]: there is"]),
        (json.dumps(talk("3", studies=[{"series": "SECRET"}])), ["studies[0].series: is not in the store"]),
        (json.dumps(talk("4", studies=[{"series": CT, "windows": ["lugn"], "frames": {"range_mm": [9, 10]}}])),
         ["studies[0].windows[0]: is not known", "studies[0].frames.range_mm: begins beyond the series"]),
        (json.dumps(talk("5", studies=[{"series": CT, "frames": {"range_s": [0, 1]}},
                                       {"series": RUN, "frames": {"range_s": [5, 6]}}])),
         ["studies[0].frames.range_s: is given for a series without time",
          "studies[1].frames.range_s: begins beyond the run; its volumes lie from 0 to 4.5 s"]),
        (json.dumps(talk("6", **boxes)),
         ["objects.bbox[0]: lies outside 40 x 30", "objects.bbox[1]: has its corners",
          "objects.bbox[2]: is in pixels of a picture that is not there"]),
        (json.dumps(talk("7 <bbox>", objects={"bbox": [[1001, 0]], "bbox_type": "norm1000"})),
         ["objects.bbox[0]: lies outside 1000 x 1000"]),
        (json.dumps(talk("8 <ref-object>", objects={"bbox": [[0], [1, "2"]], "ref": ["a", "b"]})),
         ["objects.ref: has 2 entries and the messages 1 <ref-object>", "objects.bbox[0]: is no box",
          "objects.bbox[1]: is no box"]),
        (json.dumps(talk("8 <bbox>", objects={"bbox_type": "SECRET"})),
         ["objects.bbox: has 0", "objects.bbox_type: is not known"]),
        (json.dumps(talk("9 <image><study>", images="<")),
         ["images[0]: there is no such file", "studies: has 0 entries and the messages 1 <study>"]),
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(line for line, _ in lines))
    code, output = run(capsys, path, path, "--store", store)
    assert code == 1 and "SECRET" not in output
    for number, (_, expected) in enumerate(lines, 1):
        told = [line for line in output.splitlines() if line.startswith(f"{path}:{number}: ")]
        assert len(told) == 2 * len(expected), (number, told)
        for says in expected:
            assert sum(f": {says}" in line and "; " in line for line in told) == 2, (says, told)
    assert f"{path}: {len(lines)} lines, {sum(len(expected) for _, expected in lines)} problems" in output


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    code, output = run(capsys, tmp_path / "none.jsonl")
    assert code == 2 and output.startswith("validate_samples: ") and output.count("\n") == 1
    (tmp_path / "empty.jsonl").write_text("\n")
    code, output = run(capsys, tmp_path / "empty.jsonl")
    assert code == 1 and "there are no samples; write one JSON object a line" in output
    code, output = run(capsys, tmp_path / "empty.jsonl", "--store", tmp_path)
    assert code == 2 and "is not a volume store" in output


POOLS = "pools:\n  general: {num_experts: 1}\n  chest: {num_experts: 1, labels: [Thorax]}\n"


def test_labels_that_call_no_pool_are_named(tmp_path, capsys):
    path, moe, config = (tmp_path / name for name in ("samples.jsonl", "moe.yaml", "config.yaml"))
    labels = [["chest"], ["thorax", "general"], [], ["SECRET"], None]
    lines = [talk(f"question {i}", **({} if x is None else {"specialties": x})) for i, x in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, lines)))
    moe.write_text(POOLS)
    config.write_text("model:\n  language:\n    moe:\n" + "".join(f"      {line}\n" for line in POOLS.splitlines()))
    for pools in (moe, config):
        code, output = run(capsys, path, "--pools", pools)
        assert code == 1 and "SECRET" not in output
        assert f"{path}:4: specialties: has a label that calls no pool; it may be chest, thorax, or general" in output
        assert output.count("calls no pool") == 1
    moe.write_text("num_experts: 0\n")
    code, output = run(capsys, path, "--pools", moe)
    assert code == 2 and f"{moe}: names no pools of experts" in output
