"""A folder's model here and in transformers: logits, loss, gradients, and the words that follow.

Both compute in float32 with logits of order 1 to 10, and differ in the order of sums: q, k and v are one product here,
gate and up another, documents are packed into one row.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from megamed.checkpoint.hf.convert import open_folder
from megamed.checkpoint.hf.names import name_of
from megamed.checkpoint.hf.start import model_of_folder
from megamed.data import Frame
from megamed.generate import greedy
from megamed.models.families import INTERNVL
from megamed.models.vlm import VLMConfig
from megamed.models.weight_map import to_theirs
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.whole import merge, shards
from tests.checkpoint.hf.folders import IMAGE_TOKEN, native, release, save
from tests.checkpoint.small_models import SEQ_LENGTH, build, logits_of

# Measured: 2.5e-6 for logits, 1.5e-6 for the first gradient; twenty times that leaves room for other processors.
TOLERANCE = 5e-5
ANSWER = 6
# Llama, Qwen2 and Qwen3 by themselves are compared in tests/models/language.
FAMILIES = [
    ("internvl_chat", "internlm2"), ("internvl_chat", "phi3"), ("internvl", "qwen2"), ("internvl", "qwen3_moe"),
    ("internvl", "mixtral"),
]  # fmt: skip


def source() -> SyntheticSource:
    """Documents with several frames, one and none; no word of theirs is the image's."""
    return SyntheticSource(SEQ_LENGTH, vocab_size=IMAGE_TOKEN)


@dataclass
class Question:
    """A document of the source as a prompt."""

    prompt_tokens: list[int]
    visual_positions: list[int]
    frames: list[Frame]
    specialties: int = 0
    sample_id: str = field(default="")


def documents(index: int) -> list[tuple[Tensor, list[int], list[Frame], slice]]:
    """Tokens, places of visual tokens, frames and rows of each document of a microbatch."""
    row = source().microbatch(index)
    found, frames, bounds = [], list(row.frames), row.cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        places = [p - start for p in row.visual_positions.tolist() if start <= p < end]
        own, frames = frames[: len(places) // 4], frames[len(places) // 4 :]
        if not row.padding_S[start]:
            found.append((row.tokens_S[start:end], places, own, slice(start, end)))
    return found


def asked_of(tokens: Tensor, places: list[int], frames: list[Frame]) -> dict[str, Any]:
    """What transformers' model takes."""
    ids = tokens.clone()
    ids[places] = IMAGE_TOKEN
    pixels = {"pixel_values": source().load_frames(frames)} if frames else {}
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **pixels}


def _ours(folder: str) -> tuple[np.ndarray, float, dict[str, np.ndarray], list[list[int]]]:
    """Logits of two microbatches, loss and gradients of them, and answers to the first one's documents."""
    config = model_of_folder(Path(folder), VLMConfig())
    job, manager = build(config, Path(folder) / "unused" / "checkpoints", {})
    manager.start_from(None, folder)
    logits = logits_of(job, (0,), source())
    questions = [Question(tokens.tolist(), places, frames) for tokens, places, frames, _ in documents(0)]
    answers = greedy(
        job.model, job.phase, job.mesh, questions, source().load_frames, SEQ_LENGTH, config.language.vocab_size,
        ANSWER, end_id=-1, pad_id=0,
    )  # fmt: skip
    for part in job.model.parts:
        part.train()
    report = job.stepper.gradients([source().microbatch(i) for i in range(2)], source().load_frames)
    gradients = {_name(key): value for key, value in merge([shards(job.model, gradients=True)]).items()}
    return logits, report.loss, gradients, answers


def _name(key: str) -> str:
    """The name of a whole gradient as tables have it."""
    found = re.fullmatch(r"(.*?)(?:\[([\d,]+)\])?", key)
    assert found is not None
    stack = tuple(map(int, found[2].split(","))) if found[2] else ()
    return name_of(found[1] if found[1].startswith("vision.") else f"language.{found[1]}", stack)


def make(folder: Path, family: str, decoder: str) -> InternVLForConditionalGeneration:
    folder.mkdir()
    if family == "internvl_chat":
        return release(folder, decoder, torch.float32)
    model = native(decoder)
    save(model, folder, torch.float32)
    return model


@pytest.mark.parametrize(("family", "decoder"), FAMILIES)
def test_the_same_logits_loss_gradients_and_words(family: str, decoder: str, tmp_path: Path, ranks: Any) -> None:
    model = make(tmp_path / "hf", family, decoder)
    logits, loss, gradients, answers = ranks.run(_ours, 1, str(tmp_path / "hf"))[0]
    at, sums, count, num_frames = 0, torch.zeros(()), 0, set()
    for index in range(2):
        row = source().microbatch(index)
        for number, (tokens, places, frames, rows) in enumerate(documents(index)):
            asked = asked_of(tokens, places, frames)
            their_logits = model(**asked).logits[0]
            ours = logits[at : at + len(tokens)]
            np.testing.assert_allclose(ours, their_logits.detach().numpy(), atol=TOLERANCE, rtol=0)
            at += len(tokens)
            num_frames.add(len(frames))
            labelled = row.loss_kind_S[rows] > 0
            losses = torch.nn.functional.cross_entropy(
                their_logits[labelled], row.labels_S[rows][labelled], reduction="sum"
            )  # fmt: skip
            sums, count = sums + losses, count + int(labelled.sum())
            if index == 0:
                words = model.generate(  # type: ignore[operator]
                    **asked, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None, pad_token_id=0
                )
                assert answers[number] == words[0, len(tokens) :].tolist()
    assert at == len(logits) and num_frames >= {0, 1, 5} and np.abs(logits).max() > 0.5
    theirs = sums / count
    assert loss == pytest.approx(theirs.item(), abs=TOLERANCE)
    if decoder == "qwen2":
        theirs.backward()
        compare_gradients(tmp_path / "hf", decoder, model, gradients)


def compare_gradients(folder: Path, decoder: str, model: Any, gradients: dict[str, np.ndarray]) -> None:
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    table = INTERNVL.table(open_folder(folder).model, decoder, wanted)  # type: ignore[arg-type]
    found = to_theirs(table, {name: torch.from_numpy(value) for name, value in gradients.items()})
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient is not None, name
        largest = float(gradient.abs().max())
        assert float((found[name] - gradient).abs().max()) <= TOLERANCE * max(largest, 1e-3), name
