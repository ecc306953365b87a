"""Greedy decoding gives the same words at every layout, and the words that plain argmax gives."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megamed.data import FrameRef
from megamed.generate import greedy
from megamed.generate.greedy import _lay_out
from megamed.models.language import Packing
from megamed.models.vlm import embed_with_visual_tokens
from megamed.optim import OptimConfig
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig, build_job

SEQ_LENGTH, VOCAB, NEW = 64, 250, 6


@dataclass(frozen=True)
class Question:
    prompt_tokens: list[int]
    visual_positions: list[int]
    frames: list[FrameRef]
    specialties: int = 0


def questions() -> list[Question]:
    """Several prompts of different lengths, with two frames, one and none: more than fit into one row."""
    rng = np.random.default_rng(3)
    made = []
    for index, num_frames in enumerate([2, 0, 1, 0, 2, 0, 1]):
        text = rng.integers(1, VOCAB, 8 + index).tolist()
        visual = list(range(3, 3 + 4 * num_frames))
        frames = [FrameRef(first=index, num_volumes=num_frames, index=i) for i in range(num_frames)]
        made.append(Question([*text[:3], *[0] * len(visual), *text[3:]], visual, frames))
    return made


def decode(parallel: dict[str, Any], experts: int, end_id: int) -> list[list[int]]:
    job = _job(parallel, experts)
    source = SyntheticSource(SEQ_LENGTH)
    return greedy(
        job.model, job.phase, job.mesh, questions(), source.load_frames, SEQ_LENGTH, VOCAB, NEW, end_id, pad_id=0
    )


def _job(parallel: dict[str, Any], experts: int) -> Any:
    config = JobConfig()
    # Large weights make large differences between logits: no layout's rounding turns one argmax into another.
    config.model = tiny_vlm(experts, init_std=0.3)
    config.parallel = ParallelConfig(**parallel)
    config.optim = OptimConfig()
    config.data.seq_length = SEQ_LENGTH
    mesh = build_mesh(config.parallel, config.ulysses)
    seed_everything(1, mesh.data_rank)
    return build_job(config, mesh)


def one_by_one() -> list[list[int]]:
    """The same, one prompt in one row at a time, with plain argmax."""
    job = _job({}, 0)
    source = SyntheticSource(SEQ_LENGTH)
    model = job.model.language[0].module
    answers = []
    for question in questions():
        tokens = list(question.prompt_tokens)
        with torch.no_grad():
            rows = (
                job.model.vision.module(source.load_frames(question.frames)) if question.frames else torch.empty(0, 64)
            )
            for _ in range(NEW):
                ids, places = torch.tensor([tokens]), torch.arange(len(tokens))[None]
                index = torch.tensor(question.visual_positions, dtype=torch.int64)
                embedded = embed_with_visual_tokens(model, ids, places, rows, index)
                bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
                packing = Packing.of_row(bounds)
                logits: Tensor = model(ids, places, None, decoder_input=embedded, packed_seq_params=packing)
                tokens.append(int(logits[0, -1, :VOCAB].argmax()))
        answers.append(tokens[len(question.prompt_tokens) :])
    return answers


def test_prompts_with_room_for_answers_are_filled_up_to_a_multiple() -> None:
    rows, slots = _lay_out(questions(), SEQ_LENGTH, NEW, pad_id=0, document_multiple=8)
    assert len(rows) > 1 and not any((row.cu_seqlens % 8).any() for row in rows)
    for slot, question in zip(slots, questions(), strict=True):
        document = rows[slot.row].tokens_S[slot.start :]
        assert slot.start in rows[slot.row].cu_seqlens and len(document) >= slot.length + NEW
        assert document[: slot.length].tolist() == question.prompt_tokens


@pytest.fixture(scope="module")
def expected(ranks: Any) -> list[list[int]]:
    return ranks.run(one_by_one, 1)[0]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {}),  # more replicas than some have rows
        (8, {"tensor": 2, "pipeline": 2}),
        (4, {"context": 4}),
        (8, {"context": 2, "tensor": 2, "sequence": True, "pipeline": 2}),
    ],
    ids=["one", "TP2", "TP2 + SP", "PP2 interleaved", "DP4", "TP2 PP2 DP2", "CP4", "CP2 TP2 + SP PP2"],
)
def test_every_layout_gives_plain_argmax(
    size: int, parallel: dict[str, Any], expected: list[list[int]], ranks: Any
) -> None:
    for answers in ranks.run(decode, size, parallel, 0, -1):
        assert answers == expected


def test_experts_spread_over_replicas_stay_in_step(ranks: Any) -> None:
    one = ranks.run(decode, 1, {}, 4, -1)[0]
    assert ranks.run(decode, 2, {"expert": 2}, 4, -1) == [one, one]


def test_an_answer_ends_before_the_end_token(expected: list[list[int]], ranks: Any) -> None:
    end_id = expected[0][2]
    answers = ranks.run(decode, 2, {"tensor": 2}, 0, end_id)[0]
    cut = [a[: a.index(end_id)] if end_id in a else a for a in expected]
    assert answers == cut
    assert len(cut[0]) <= 2
