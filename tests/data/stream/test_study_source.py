"""Rows of a volume store: by number alone, at an exact position, held out by patient, whatever loads their frames."""

import hashlib
import json
import logging
import re

import pytest
import torch

from megamed.data import DatasetConfig, MicrobatchSource
from megamed.data.fmri.source import FmriSource
from megamed.data.stream.held_out import held_out_patients
from megamed.utils import UserError
from megamed.utils.optional import optional_import
from tests.data.stream.studies import (
    SERIES,
    SIZE,
    TOKENIZER,
    TOKENS_PER_FRAME,
    config,
    make_samples,
    make_store,
    name,
    source,
)

NUM_ROWS = 60
LOADERS = ["numpy", pytest.param("dali", marks=pytest.mark.skipif(
    optional_import("nvidia.dali") is None, reason="DALI is not installed"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with one series of each kind, and samples about them."""
    folder = tmp_path_factory.mktemp("studies")
    make_store(folder / "store")
    make_samples(folder / "talk.jsonl")
    return folder


def mixed(folder, **values):
    return config(folder / "store", folder / "talk.jsonl", **values)


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def pixels(made, row) -> str:
    return hashlib.sha256(made.load_frames(row.frames).cpu().numpy().tobytes()).hexdigest()


def shown(row) -> set[str]:
    return {frame.frame.path.split("/")[-2] for frame in row.frames}


def test_a_row_is_a_function_of_its_number(folder):
    first, second = source(mixed(folder)), source(mixed(folder))
    rows = [first.microbatch(index) for index in range(NUM_ROWS)]
    assert all(same(second.microbatch(index), rows[index]) for index in (33, 2, 39, 0))
    assert not same(source(mixed(folder, seed=5)).microbatch(0), rows[0])
    typed: MicrobatchSource = first
    assert typed.microbatch(0).tokens_S.shape == (512,)
    names = [sample for row in rows for sample in row.sample_ids]
    assert len(set(names)) < len(names)  # the talk has been gone through more than once by now
    assert all(re.fullmatch(r"talk:\d+|facts:\d+\.\d+", sample) for sample in names)
    planned = first.planned(7)
    assert [s.num_tokens for s in planned.sizes] == rows[7].cu_seqlens.diff()[: len(planned.sizes)].tolist()
    assert sum(s.num_frames for s in planned.sizes) == len(rows[7].frames)


def test_rows_are_filled_and_hold_the_mixture(folder):
    made = source(mixed(folder, seq_length=1024))
    rows = [made.microbatch(index) for index in range(60)]
    # Blocks are of 8 rows, and samples large beside a row; a realistic mixture is packed in another test.
    assert sum(row.num_real for row in rows) / (60 * 1024) > 0.9
    names = [sample.partition(":")[0] for row in rows for sample in row.sample_ids]
    assert names.count("talk") / len(names) == pytest.approx(2 / 3, abs=0.02)


def test_documents_are_filled_up_to_a_multiple(folder):
    made = source(mixed(folder), document_multiple=16)
    for index in range(10):
        row = made.microbatch(index)
        assert not (row.cu_seqlens % 16).any()
        lengths = row.cu_seqlens.diff()[: len(row.sample_ids)].tolist()
        assert [size.num_tokens for size in made.planned(index).sizes] == lengths


def test_training_never_shows_a_held_out_patient(folder):
    made = source(mixed(folder))
    seen = set().union(*(shown(made.microbatch(index)) for index in range(150)))
    items = made.held_out()
    asked = {frame.frame.path.split("/")[-2] for item in items for frame in item.frames}
    patients = {name(number): patient for number, (patient, _) in enumerate(SERIES)}
    assert asked and not {patients[series] for series in seen} & {patients[series] for series in asked}
    # Everything is one or the other: both series of patient 0 together.
    assert seen | asked == set(patients) and 1 <= len({patients[s] for s in asked}) <= 3


def test_held_out_questions(folder):
    made = source(config(folder / "store", held_out=0.6))
    items = made.held_out()
    assert [item.item_id for item in items] == [item.item_id for item in source(mixed(folder, held_out=0.6)).held_out()]
    assert len({item.item_id for item in items}) == len(items) > 10
    for item in items:
        assert item.judge(item.qa.answer) and not item.judge("")
        context = [i for i, token in enumerate(item.prompt_tokens) if token == TOKENIZER.img_context_id]
        assert context == item.visual_positions and len(context) == TOKENS_PER_FRAME * len(item.frames)
        assert TOKENIZER.decode(item.prompt_tokens).endswith(f"{item.qa.question}\nassistant\n")
        assert made.load_frames(item.frames[:1]).shape == (1, 3, SIZE, SIZE)
    assert source(config(folder / "store", held_out=0.0)).held_out() == []


def test_held_out_patients_are_chosen_by_themselves():
    patients = {f"{number:020x}" for number in range(2000)}
    chosen = held_out_patients(patients, 0.1)
    assert 0.08 < len(chosen) / 2000 < 0.12
    some = set(sorted(patients)[:700])
    assert held_out_patients(some, 0.1) == chosen & some  # whoever else is there
    for few in ({"a", "b"}, {"a", "b", "c"}):
        assert all(1 <= len(held_out_patients(few, share)) < len(few) for share in (0.01, 0.5, 0.99))
    assert held_out_patients({"a"}, 0.5) == held_out_patients(patients, 0.0) == set()


def test_held_out_questions_leave_room_for_the_answer(folder):
    items = source(config(folder / "store", held_out=0.6, seq_length=400)).held_out()
    assert max(len(item.prompt_tokens) for item in items) <= 300
    assert {"num_slices", "order"} <= {item.qa.name for item in items}


def test_one_patient_is_trained_on(tmp_path, caplog):
    made = config(make_store(tmp_path / "store", SERIES[:2]).root)
    with caplog.at_level(logging.WARNING, "megamed.data"):
        assert source(made).held_out() == []
    assert "all series are of one patient: nothing is held out" in caplog.text


@pytest.mark.parametrize("backend", LOADERS)
@pytest.mark.parametrize("stop", [5, 21])
def test_the_position_is_exact(folder, backend, stop):
    """After a stop the next rows and their pixels are what they would have been, augmentation included."""

    def fresh():
        made = mixed(folder)
        made.loader.backend = backend
        made.frames.augment.enabled = True
        return source(made)

    whole = fresh()
    expected = [(row.sample_ids, pixels(whole, row)) for row in map(whole.microbatch, range(stop + 8))]
    state = json.loads(json.dumps(whole.state(stop)))
    resumed = fresh()
    resumed.restore(stop, state)
    assert [(row.sample_ids, pixels(resumed, row)) for row in map(resumed.microbatch, range(stop, stop + 8))] == (
        expected[stop:]
    )
    assert resumed.state(stop) == whole.state(stop)


def test_augmentation_is_the_samples_own(folder):
    made = mixed(folder)
    made.frames.augment.enabled = True
    varied, plain = source(made), source(mixed(folder))
    row = next(row for row in map(varied.microbatch, range(20)) if len(row.frames) > 3)
    assert pixels(varied, row) == pixels(varied, row) != pixels(plain, row)
    by_sample = {frame.seed for frame in row.frames}
    assert 1 <= len(by_sample) <= len(row.sample_ids)
    # The sample's next pass looks otherwise.
    again = {frame.seed for index in range(20, 60) for frame in varied.microbatch(index).frames}
    assert len(again) > 20


def test_rows_are_shared_out_by_cost(folder):
    made = source(mixed(folder))

    def cost(lengths, num_frames):
        return sum(n * n for n in lengths) + 1000.0 * num_frames

    one = made.share(8, 8, 1, cost)
    four = made.share(8, 8, 4, cost)
    assert sorted(one[0]) == sorted(sum(four, [])) == list(range(8, 16))
    assert [len(share) for share in four] == [2] * 4

    def spread(shares):
        totals = [sum(cost(made.microbatch(i).cu_seqlens.diff().tolist(), len(made.microbatch(i).frames)) for i in s)
                  for s in shares]
        return max(totals) / (sum(totals) / len(totals))

    assert spread(four) < spread([[8 + i, 12 + i] for i in range(4)])


@pytest.mark.parametrize(("change", "says"), [
    (dict(seq_length=1024), "data.seq_length was 512, is 1024"),
    (dict(questions=2), "data.questions was 3, is 2"),
    (dict(held_out=0.6), "held-out series was "),
    ("samples", "data sets.talk.samples was 60, is 61"),
    ("weight", "data sets.talk.weight was 2.0, is 1.0"),
    ("other", "data sets.other.samples was not there, is 60"),
    ("frames", "data.frames.choice.at_most was 12, is 8"),
])
def test_other_data_are_noticed(folder, tmp_path, change, says, caplog):
    state = source(mixed(folder)).state(20)
    made = mixed(folder, **(change if isinstance(change, dict) else {}))
    if change == "samples":
        longer = tmp_path / "talk.jsonl"
        lines = (folder / "talk.jsonl").read_text()
        longer.write_text(lines + lines.splitlines(keepends=True)[0])
        made.datasets[0].path = str(longer)
    elif change == "weight":
        made.datasets[0].weight = 1.0
    elif change == "other":
        made.datasets.append(DatasetConfig("other", str(folder / "talk.jsonl")))
    elif change == "frames":
        made.frames.choice.at_most = 8
    with pytest.raises(UserError) as caught:
        source(made).restore(20, state)
    assert says in str(caught.value) and "data.accept_changes=true" in str(caught.value)
    made.accept_changes = True
    changed = source(made)
    with caplog.at_level(logging.WARNING, "megamed.data"):
        changed.restore(20, state)
    assert says in caplog.text
    assert changed.microbatch(20).num_real > 0
    again = source(made)
    again.restore(20, changed.state(20))  # and from there it is a position as any other
    assert same(again.microbatch(25), changed.microbatch(25))


def long_samples(path, series, text="Long?"):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    studies = [{"series": one} for one in series]
    path.write_text(json.dumps({"messages": turns, "studies": studies}) + "\n")
    return path


def only(folder, path, **values):
    made = config(folder / "store", path, **{"held_out": 0.0, **values})
    made.datasets = [DatasetConfig("long", str(path))]
    return made


def test_too_long_a_sample_shows_fewer_frames_evenly(folder, tmp_path, caplog):
    path = long_samples(tmp_path / "long.jsonl", [name(0), name(6)])
    whole = source(only(folder, path, seq_length=2048)).microbatch(0)
    assert [f.frame.slices[1] for f in whole.frames[:24]] == [*range(12)] * 2
    with caplog.at_level(logging.WARNING, "megamed.data"):
        made = source(only(folder, path, seq_length=512))
        rows = [made.microbatch(index) for index in range(3)]
    slices = [f.frame.slices[1] for f in rows[0].frames]
    count = len(slices) // 2
    assert 4 <= count < 12 and slices[:count] == slices[count:] and slices[0] == 0 and slices[count - 1] == 11
    assert max(b - a for a, b in zip(slices[:count], slices[1:count], strict=False)) <= -(-11 // (count - 1)) + 1
    # As many as fit: two frames more do not.
    per_frame = TOKENS_PER_FRAME + 2 + len("z=12.5 mm")
    assert 512 - 2 * per_frame <= rows[0].num_real <= 512
    assert rows[0].sample_ids == ["long:1"] and f"{count} of 12 slices" in TOKENIZER.decode(rows[0].tokens_S.tolist())
    assert caplog.text.count("sample long:1 has ") == 1 and f"shown with {2 * count} of its 24 frames" in caplog.text


def test_too_long_otherwise(folder, tmp_path):
    path = long_samples(tmp_path / "long.jsonl", [name(0)])
    with pytest.raises(UserError, match=r"sample long:1 has \d+ tokens and data.seq_length is 256; .*data.too_long"):
        source(only(folder, path, seq_length=256, too_long="refuse")).microbatch(0)
    with pytest.raises(UserError, match="data set long: none of its 1 samples can be used"):
        source(only(folder, path, seq_length=256, too_long="skip")).microbatch(0)
    # Text is never cut.
    path = long_samples(tmp_path / "text.jsonl", [name(0)], text="word " * 200)
    with pytest.raises(UserError, match="none of its 1 samples can be used"):
        source(only(folder, path, seq_length=512)).microbatch(0)


@pytest.mark.parametrize(("break_it", "says"), [
    (lambda made, folder: setattr(made, "store", str(folder / "nowhere")), "nowhere is not a volume store"),
    (lambda made, folder: setattr(made, "store", str(folder / "empty")), "the store has no series; add some with"),
    (lambda made, folder: setattr(made.datasets[0], "path", str(folder / "none.jsonl")), "none.jsonl: the samples"),
    (lambda made, folder: setattr(made, "store", ""), "data set facts: path=facts needs a volume store"),
    (lambda made, folder: made.datasets.pop(1) and setattr(made, "store", ""), "is not in data.store; ingest it"),
    (lambda made, folder: setattr(made.datasets[0], "path", str(folder / "gone.jsonl")), "gone.jsonl:1: series abc"),
    (lambda made, folder: setattr(made.datasets[0], "path", str(folder / "bad.jsonl")), "bad.jsonl:2: is no JSON"),
    (lambda made, folder: setattr(made.datasets[1], "name", "talk"), "data.datasets is ['talk', 'talk']"),
    (lambda made, folder: setattr(made.datasets[1], "weight", 0.0), "data.datasets[1].weight is 0.0"),
    (lambda made, folder: setattr(made.packing, "rows_per_block", 0), "data.packing.rows_per_block is 0"),
])
def test_data_that_cannot_be_used(folder, tmp_path, break_it, says):
    (tmp_path / "gone.jsonl").write_text(
        '{"messages": [{"role": "assistant", "content": "A"}], "studies": ["abc"]}\n')
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "assistant", "content": "A"}]}\n{oh\n')
    make_store(tmp_path / "empty", ())
    made = mixed(folder)
    break_it(made, tmp_path)
    with pytest.raises(UserError, match=re.escape(says)):
        source(made)


def test_reports_are_taken_where_a_store_has_them(folder, tmp_path):
    store = make_store(tmp_path / "store")
    assert {i.partition(":")[0] for i in source(config(store.root)).microbatch(0).sample_ids} == {"facts"}
    make_samples(store.root / "samples.jsonl", count=30)
    assert {i.partition(":")[0] for i in source(config(store.root)).microbatch(0).sample_ids} == {"reports"}


def test_without_store_or_samples_it_is_a_run():
    from megamed.data import DataConfig, build_source

    assert isinstance(build_source(DataConfig(), TOKENIZER, SIZE, TOKENS_PER_FRAME), FmriSource)
