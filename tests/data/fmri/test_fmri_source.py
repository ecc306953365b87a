"""The fMRI source: rows by number, true answers, training and held-out parts that never meet."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megamed.data import (
    QUESTIONS,
    DataConfig,
    FmriRun,
    FmriSource,
    FrameRef,
    MicrobatchSource,
    load_tokenizer,
    measure,
    mosaic_frames,
    read_run,
)
from megamed.data.fmri import source as fmri_module
from megamed.utils import UserError

REAL_DICOM = Path(__file__).resolve().parents[4] / "shared" / "data" / "fmri_dicom" / "dicoms"
TOKENIZER = load_tokenizer("bytes")
SIZE, TOKENS_PER_FRAME = 28, 4
NUM_ROWS = 120
TURN = re.compile(r"(?P<question>[^\n>]*)<\|im_end\|>\n<\|im_start\|>assistant\n(?P<answer>[^<]*)<\|im_end\|>")


@pytest.fixture(scope="module")
def run() -> FmriRun:
    return read_run("nibabel:functional.nii")


@pytest.fixture(scope="module")
def source(run) -> FmriSource:
    return make(run)


def make(run: FmriRun, **values) -> FmriSource:
    return FmriSource(run, DataConfig(**values), TOKENIZER, SIZE, TOKENS_PER_FRAME)


def documents(row):
    """Of each document of a row: its sample id, its frames and its text."""
    names = {TOKENIZER.im_start_id: "<|im_start|>", TOKENIZER.im_end_id: "<|im_end|>"}
    visual = set(row.visual_positions.tolist())
    frames = iter(row.frames)
    for i, name in enumerate(row.sample_ids):
        places = range(int(row.cu_seqlens[i]), int(row.cu_seqlens[i + 1]))
        num_visual = sum(place in visual for place in places)
        text = "".join(
            names.get(token, chr(token) if token < 256 else "") for token in row.tokens_S[list(places)].tolist()
        )
        yield name, [next(frames) for _ in range(num_visual // TOKENS_PER_FRAME)], text


def kind_of(question: str) -> str:
    return next(name for name, kind in QUESTIONS.items() if question in kind.phrasings)


def facts_of(run: FmriRun, frames):
    """Measured again, from the volumes that the frames name."""
    volumes = [frame.first + frame.index * frame.stride for frame in frames]
    return measure(run.signal_XYZT[..., volumes], run.voxel_size_mm, run.repetition_time_s * frames[0].stride)


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_row_is_a_function_of_seed_and_index(run, source):
    other = make(run)
    for index in (5, 0, 5, 99):  # in any order, in any process
        assert same(source.microbatch(index), other.microbatch(index))
    assert not same(source.microbatch(1), source.microbatch(2))
    assert not same(source.microbatch(1), make(run, seed=7).microbatch(1))


def test_answers_are_true_of_what_is_shown(run, source):
    """Every answer of many rows, against facts measured anew or read in the sample's own text."""
    asked: dict[str, int] = {}
    for index in range(NUM_ROWS):
        for sample_id, frames, text in documents(source.microbatch(index)):
            turns = [(turn["question"], turn["answer"]) for turn in TURN.finditer(text)]
            assert 1 <= len(turns) <= 3
            if frames:
                facts = facts_of(run, frames)
            else:
                first, length = map(int, sample_id.rpartition(":")[2].split("+"))
                facts = facts_of(run, [FrameRef(first, length, i) for i in range(length)])
                stated = text.split("\n")[1].removeprefix("fMRI: ").removesuffix(".").split("; ")
                assert len(stated) == len(turns) + 1  # and one fact that is not asked about
            for question, answer in turns:
                name = kind_of(question)
                asked[name] = asked.get(name, 0) + 1
                assert answer == QUESTIONS[name].answer(facts) and QUESTIONS[name].judge(answer, facts)
                assert frames or QUESTIONS[name].statement(facts) in stated
    assert set(asked) == set(QUESTIONS)


def test_mixture(source):
    num_frames = [
        len(frames) for index in range(NUM_ROWS) for _, frames, _ in documents(source.microbatch(index))
    ]
    assert set(num_frames) == {0, 1, 3, 4, 5, 6, 7, 8}
    # 5 % and 10 % of the samples are drawn, and short ones also fill the ends of rows.
    assert 0.03 < num_frames.count(0) / len(num_frames) < 0.12
    assert 0.06 < num_frames.count(1) / len(num_frames) < 0.22


def test_rows_are_well_filled(source):
    filled = [source.microbatch(index).num_real / 512 for index in range(NUM_ROWS)]
    assert np.mean(filled) > 0.8 and min(filled) > 0.3


def test_documents_are_filled_up_to_a_multiple(run, source):
    filled = FmriSource(run, DataConfig(), TOKENIZER, SIZE, TOKENS_PER_FRAME, document_multiple=16)
    for index in range(NUM_ROWS):
        row = filled.microbatch(index)
        assert not (row.cu_seqlens % 16).any()
        # The same draws, of which fewer may fit.
        assert next(documents(row))[1] == next(documents(source.microbatch(index)))[1]


def test_stride_is_said(run, source):
    strides = set()
    for index in range(40):
        for _, frames, text in documents(source.microbatch(index)):
            if frames:
                strides.add(frames[0].stride)
                assert ("One of every 2 volumes, TR 4.0 s." in text) == (frames[0].stride == 2)
                assert [frame.index for frame in frames] == list(range(frames[0].num_volumes))
    assert strides == {1, 2}


def test_training_never_shows_the_held_out_part(source):
    def volumes(frames):
        return {f.first + i * f.stride for f in frames for i in range(f.num_volumes)}

    shown = set().union(*(volumes(source.microbatch(index).frames) for index in range(NUM_ROWS)))
    held_out = set().union(*(volumes(item.frames) for item in source.held_out()))
    assert shown == set(range(15)) and held_out == set(range(15, 20))


def test_held_out_items(run, source):
    items = source.held_out()
    assert items == make(run).held_out()
    assert {item.qa.name for item in items} == {name for name, kind in QUESTIONS.items() if kind.shown}
    assert len({item.item_id for item in items}) == len(items)
    for item in items:
        facts = facts_of(run, item.frames)
        assert item.qa.answer == QUESTIONS[item.qa.name].answer(facts)
        assert item.judge(item.qa.answer) and not item.judge("")
        context = [i for i, token in enumerate(item.prompt_tokens) if token == TOKENIZER.img_context_id]
        assert context == item.visual_positions and len(context) == TOKENS_PER_FRAME * len(item.frames)
        assert TOKENIZER.decode(item.prompt_tokens).endswith(f"{item.qa.question}\nassistant\n")


def test_held_out_of_a_long_run_is_a_sample(run):
    long = dataclasses.replace(run, signal_XYZT=np.tile(run.signal_XYZT, 5))
    items = make(long).held_out()
    stretches = {(item.frames[0].first, item.frames[0].num_volumes) for item in items}
    assert len(stretches) == fmri_module.HELD_OUT_STRETCHES + fmri_module.HELD_OUT_VOLUMES
    assert make(run, held_out=0.0).held_out() == []


def test_frames_are_those_of_their_stretch(run, source):
    refs = [FrameRef(2, 4, 3), FrameRef(0, 5, 1, stride=2), FrameRef(2, 4, 0), FrameRef(9, 1, 0)]
    frames = source.load_frames(refs)
    assert frames.shape == (4, 3, SIZE, SIZE) and frames.dtype == torch.float32
    first = mosaic_frames(run.signal_XYZT[..., 2:6], SIZE)
    assert torch.equal(frames[0], first[3]) and torch.equal(frames[2], first[0])
    assert torch.equal(frames[1], mosaic_frames(run.signal_XYZT[..., 0:9:2], SIZE)[1])
    assert source.load_frames([]).shape == (0, 3, SIZE, SIZE)
    # A rank that encodes one frame of a row gets exactly what a rank that encodes all of them gets.
    row = source.microbatch(0)
    assert torch.equal(source.load_frames(row.frames[1:2])[0], make(run).load_frames(row.frames)[1])


def test_only_the_frames_asked_for_are_built(run, monkeypatch):
    built = []
    frame = fmri_module.mosaic_frames

    def counted(signal, size, indices, scale):
        built.extend(indices)
        return frame(signal, size, indices, scale)

    monkeypatch.setattr(fmri_module, "mosaic_frames", counted)
    make(run).load_frames([FrameRef(0, 8, 5)])
    assert built == [5]


def test_is_a_microbatch_source(source):
    typed: MicrobatchSource = source
    assert typed.microbatch(0).tokens_S.shape == (512,)


def test_longest_sample_is_known_beforehand(run):
    with pytest.raises(UserError, match="data.seq_length") as caught:
        make(run, seq_length=64)
    needed = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    tight = make(run, seq_length=needed)
    longest = max(
        int((row.cu_seqlens[1:] - row.cu_seqlens[:-1])[: len(row.sample_ids)].max())
        for row in map(tight.microbatch, range(300))
    )
    # Nothing is longer, and the bound is not far off: 300 rows need not hold the very longest sample.
    assert needed * 0.85 < longest <= needed
    with pytest.raises(UserError, match=f"at least {needed}"):
        make(run, seq_length=needed - 1)


def test_short_run_says_what_is_needed(run):
    short = dataclasses.replace(run, signal_XYZT=run.signal_XYZT[..., :8])
    with pytest.raises(UserError, match=r"has 8 volumes; .*need 12"):
        make(short)
    enough = dataclasses.replace(run, signal_XYZT=run.signal_XYZT[..., :12])
    assert make(enough).microbatch(0).frames
    with pytest.raises(UserError, match="data.questions"):
        make(run, questions=0)


def test_text_alone_and_no_text(run):
    assert not any(make(run, text_only=1.0).microbatch(index).frames for index in range(5))
    assert all(make(run, text_only=0.0).microbatch(index).frames for index in range(5))


def test_real_dicom_run():
    if not REAL_DICOM.is_dir():
        pytest.skip(f"no real DICOM run at {REAL_DICOM}")
    run = read_run(REAL_DICOM)
    source = FmriSource(run, DataConfig(), TOKENIZER, 56, TOKENS_PER_FRAME)
    row = source.microbatch(0)
    frames = source.load_frames(row.frames)
    assert frames.shape == (len(row.frames), 3, 56, 56) and torch.isfinite(frames).all()
    for _, refs, text in documents(row):
        for turn in TURN.finditer(text):
            if refs:
                assert turn["answer"] == QUESTIONS[kind_of(turn["question"])].answer(facts_of(run, refs))
    assert any(item.qa.answer == "3.0 x 3.0 x 3.3 mm" for item in source.held_out())
