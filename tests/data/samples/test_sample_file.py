"""Random access to lines, an index that is made once, and files that change."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from megamed.data.samples import file as sample_file
from megamed.data.samples import load
from megamed.utils import UserError


def line(number):
    return json.dumps({"query": f"{number}?" + "ä" * (number % 7), "response": str(number)}, ensure_ascii=False)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_any_line_by_number(tmp_path, monkeypatch, end, last):
    monkeypatch.setattr(sample_file, "_CHUNK", 100)
    path = tmp_path / "train.jsonl"
    texts = [line(i) for i in range(50)]
    path.write_bytes((end.join(texts) + (end if last else "")).encode())
    samples = load(path)
    assert len(samples) == 50 and samples.folder == tmp_path
    for i in (49, 0, 17):
        assert samples[i].messages[1].content == str(i) and samples[i].line == i + 1
    assert [sample.messages[1].content for sample in samples] == [str(i) for i in range(50)]
    with pytest.raises(IndexError):
        samples[50]
    assert pickle.loads(pickle.dumps(samples))[3] == samples[3]


def test_empty_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n" + line(0).encode() + b"\r\n\r\n\n" + line(1).encode() + b"\n\n{}")
    samples = load(path)
    assert [samples.line_number(i) for i in range(len(samples))] == [2, 5, 7]
    assert samples[1].messages[1].content == "1"
    with pytest.raises(UserError, match=r"train.jsonl:7: messages: there are none"):
        samples[2]


def test_the_index_is_kept_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_file, "_KEEP_BYTES", 1000)
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + "\n".join(line(i) for i in range(100)))
    steps = []
    first = load(path, lambda done, size: steps.append((done, size)))
    assert steps[-1] == (path.stat().st_size,) * 2
    kept = tmp_path / ".train.jsonl.lines.npy"
    assert sorted(p.name for p in tmp_path.iterdir()) == [kept.name, path.name]
    monkeypatch.setattr(sample_file, "_find_lines", None)  # not called again
    again = load(path)
    assert isinstance(again._starts, np.memmap) and list(again) == list(first) and again[9].line == 11
    monkeypatch.undo()
    monkeypatch.setattr(sample_file, "_KEEP_BYTES", 1000)
    with path.open("a") as file:
        file.write("\n" + line(100))
    with pytest.raises(UserError, match="has changed since it was opened"):
        first[0]
    assert len(load(path)) == 101
    for damage in (b"", b"junk", kept.read_bytes()[:300]):
        kept.write_bytes(damage)
        assert len(load(path)) == 101
    os.truncate(path, 700)
    with pytest.raises(UserError, match="has changed"):
        again[99]


@pytest.mark.parametrize(("content", "says"), [
    (b"", "has no samples"), (b"\n\r\n", "has no samples"), (b' [\n{"messages": []}]', "jq -c"),
    (b"\x1f\x8b\x08\x00", "unpack it"), (None, "cannot be read"),
])
def test_what_is_no_file_of_samples(tmp_path, content, says):
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_boxes_are_written_as_internvl_writes_them(tmp_path):
    Image.new("L", (200, 50)).save(tmp_path / "b.png")
    path = tmp_path / "train.jsonl"
    boxes = {"ref": ["nodule", "it"], "bbox": [[20, 10, 200, 50], [0.4, 25]], "image_id": [1, 1]}
    rows = [
        {"query": "<image><image>Find the <ref-object>.", "response": "<bbox>, <ref-object> at <bbox>.",
         "images": ["a.png", "b.png"], "objects": boxes},
        {"query": "Where?", "response": "<bbox>", "objects": {"bbox": [[0.1, 0.25, 0.5, 1]], "bbox_type": "norm1"}},
        {"query": "Where?", "response": "<bbox>"},
        {"query": "Where?", "response": "there", "images": ["b.png"], "objects": {"bbox": [[201, 0]]}},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    samples = load(path)
    assert [message.content for message in samples[0].messages] == [
        "<image><image>Find the <ref>nodule</ref>.",
        "<box>[[100, 200, 1000, 1000]]</box>, <ref>it</ref> at <box>[[2, 500]]</box>."]
    assert samples[1].messages[1].content == "<box>[[100, 250, 500, 1000]]</box>"
    for index, says in ((2, r":3: objects.bbox: has 0 entries"), (3, r":4: objects.bbox\[0\]: lies outside 200 x 50")):
        with pytest.raises(UserError, match=says):
            samples[index]
