"""Training rows and held-out questions out of one fMRI run.

Shape suffixes: X, Y, Z voxel axes, T volumes in time, N frames, C channels, H and W pixels.

A sample shows a stretch of consecutive volumes (or every second one, and says so), one single
volume, or no frame at all but a sentence with the facts. Every answer is measured in what the
sample shows, or stated in its text. Training samples come from the first part of the run alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamed.data.batch import QA, Document, Microbatch, conversation, pack, prompt
from megamed.data.config import DataConfig, validate
from megamed.data.fmri.facts import RunFacts, measure
from megamed.data.fmri.mosaic import StretchScale, measure_scale, mosaic_frames
from megamed.data.fmri.questions import QUESTIONS, Judge, ask, ask_one, askable, number_text
from megamed.data.fmri.run import FmriRun
from megamed.data.source import Cost, HeldOutItem, take_turns
from megamed.data.tokenizer import TextTokenizer
from megamed.utils import UserError

logger = logging.getLogger("megamed.data")

# Strides that training draws from, each as likely as it is often here.
STRIDES = (1, 1, 2)

# Share of the samples with frames that show a single volume.
ONE_FRAME = 0.1

# Documents drawn in a row that may fail to fit into what is left of it before it is closed.
MISFITS = 4

# At most so many stretches and so many single volumes of the held-out part are asked about.
HELD_OUT_STRETCHES = 24
HELD_OUT_VOLUMES = 5

# Facts kept (some hundred bytes each) and stretches whose mean volume and mask are kept (a few MB each).
_CACHED_FACTS, _CACHED_SCALES = 4096, 16


@dataclass(frozen=True)
class FrameRef:
    """One frame of a stretch of the run: volume `first + index * stride`, drawn on the scale of
    the `num_volumes` volumes `first`, `first + stride`, ... ."""

    first: int
    num_volumes: int
    index: int
    stride: int = 1


class FmriSource:
    """A `MicrobatchSource` over one fMRI run.

    Args:
        run: the run, in memory; frames are built from it when they are asked for.
        config: what samples look like.
        tokenizer: makes the text's tokens.
        image_size: edge of a frame in pixels.
        tokens_per_frame: visual tokens of one frame.
        document_multiple: documents are filled up to a multiple of it; see `pack`. It divides `config.seq_length`.
        specialties: which ones the run's samples call, bit i for the i-th; those without frames call none.

    Raises:
        UserError: a config value out of range, a run too short for the config, or rows too short
            for the longest sample.
    """

    def __init__(
        self,
        run: FmriRun,
        config: DataConfig,
        tokenizer: TextTokenizer,
        image_size: int,
        tokens_per_frame: int,
        document_multiple: int = 1,
        specialties: int = 0,
    ):
        validate(config)
        self.run = run
        self.config = config
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._tokens_per_frame = tokens_per_frame
        self._document_multiple, self._specialties = document_multiple, specialties
        self.num_training_volumes = _split(run, config)
        self._facts = lru_cache(_CACHED_FACTS)(self._measure)
        self._scale = lru_cache(_CACHED_SCALES)(self._measure_scale)
        longest = self._longest_document()
        if longest > config.seq_length:
            raise UserError(
                f"data.seq_length is {config.seq_length}, but a sample can have {longest} tokens; set "
                f"data.seq_length to at least {longest}, or lower data.max_volumes or data.questions",
                everywhere=True,
            )
        logger.info(
            "fMRI run of %d volumes: %d to train on, %d held out",
            run.num_volumes, self.num_training_volumes, run.num_volumes - self.num_training_volumes,
        )

    def microbatch(self, index: int) -> Microbatch:
        """Row number `index`, a function of the config's seed and the index alone."""
        rng = np.random.default_rng((self.config.seed, index))
        documents: list[Document] = []
        room, misfits = self.config.seq_length, 0
        while misfits < MISFITS:
            document = self._draw_document(rng, f"{index}.{len(documents)}")
            if documents and len(document.tokens) > room:
                misfits += 1
                continue
            documents.append(document)
            room -= -(-len(document.tokens) // self._document_multiple) * self._document_multiple
        return pack(documents, self.config.seq_length, self._tokenizer.pad_id, self._document_multiple)

    def load_frames(self, frames: Sequence[FrameRef]) -> Tensor:
        """frames_NCHW, float32 [len(frames), 3, image_size, image_size]; see `mosaic_frames`."""
        frames_NCHW = torch.empty(len(frames), 3, self._image_size, self._image_size)
        for n, frame in enumerate(frames):
            stretch = (frame.first, frame.num_volumes, frame.stride)
            frames_NCHW[n] = mosaic_frames(
                self._signal(*stretch), self._image_size, [frame.index], self._scale(*stretch)
            )[0]
        return frames_NCHW

    def share(self, first: int, count: int, num_shares: int, cost: Cost) -> list[list[int]]:
        """By turns: rows are much alike."""
        return take_turns(first, count, num_shares)

    def state(self, position: int) -> dict[str, Any]:
        """Nothing: a row needs its index alone."""
        return {}

    def restore(self, position: int, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def held_out(self) -> list[HeldOutItem]:
        """Each question that makes sense about stretches and single volumes of the held-out part."""
        start, end = self.num_training_volumes, self.run.num_volumes
        lengths = range(self.config.min_volumes, min(self.config.max_volumes, end - start) + 1)
        stretches = [(first, length) for length in lengths for first in range(start, end - length + 1)]
        volumes = [(first, 1) for first in range(start, end)]
        rng = np.random.default_rng(self.config.seed)
        items = []
        for first, length in [
            *_some(stretches, HELD_OUT_STRETCHES, rng),
            *_some(volumes, HELD_OUT_VOLUMES, rng),
        ]:
            facts = self._facts(first, length, 1)
            frames = _frames(first, length, 1)
            for name in askable(facts):
                qa = ask_one(name, facts, rng)
                item_id = f"held-out:{first}+{length}:{name}"
                text = prompt(self._tokenizer, self._tokens_per_frame, frames, "", qa.question, item_id)
                items.append(
                    HeldOutItem(
                        item_id, text.tokens, text.visual_positions, frames, qa, Judge(name, facts), self._specialties
                    )
                )
        return items

    def _draw_document(self, rng: np.random.Generator, name: str) -> Document:
        """A training sample."""
        if rng.random() < self.config.text_only:
            first, length, _ = self._draw_stretch(rng, (1,))
            facts = self._facts(first, length, 1)
            qas = ask(facts, rng, self.config.questions, stated=True)
            return self._document([], _statement(facts, qas, rng), qas, f"{name}:text:{first}+{length}")
        if rng.random() < ONE_FRAME:
            first, length, stride = int(rng.integers(self.num_training_volumes)), 1, 1
        else:
            first, length, stride = self._draw_stretch(rng, STRIDES)
        facts = self._facts(first, length, stride)
        qas = ask(facts, rng, self.config.questions)
        frames = _frames(first, length, stride)
        return self._document(frames, _stride_text(facts, stride), qas, f"{name}:{first}+{length}x{stride}")

    def _draw_stretch(self, rng: np.random.Generator, strides: Sequence[int]) -> tuple[int, int, int]:
        """(first, length, stride) of a stretch of the training part."""
        available = self.num_training_volumes
        length = int(rng.integers(self.config.min_volumes, min(self.config.max_volumes, available) + 1))
        stride = int(rng.choice(strides))
        if (length - 1) * stride >= available:
            stride = 1
        return int(rng.integers(available - (length - 1) * stride)), length, stride

    def _document(self, frames: Sequence[FrameRef], context: str, qas: Sequence[QA], name: str) -> Document:
        document = conversation(self._tokenizer, self._tokens_per_frame, frames, context, qas, name)
        document.specialties = self._specialties if frames else 0
        return document

    def _signal(self, first: int, length: int, stride: int) -> np.ndarray:
        """A view of the run, [X, Y, Z, length]."""
        return self.run.signal_XYZT[..., first : first + (length - 1) * stride + 1 : stride]

    def _measure(self, first: int, length: int, stride: int) -> RunFacts:
        return measure(
            self._signal(first, length, stride), self.run.voxel_size_mm, self.run.repetition_time_s * stride
        )

    def _measure_scale(self, first: int, length: int, stride: int) -> StretchScale:
        return measure_scale(self._signal(first, length, stride))

    def _longest_document(self) -> int:
        """Tokens of the longest sample that can be drawn, built from the longest fact of each kind."""
        count = self.config.questions
        lengths = range(self.config.min_volumes, self.config.max_volumes + 1)
        widest = [(stride, self._widest_facts(n, stride)) for n in lengths for stride in set(STRIDES)]
        num_tokens = lru_cache(None)(lambda text: len(self._tokenizer.encode(text)))

        qas, statements = [], []
        for name, kind in QUESTIONS.items():
            answers = [kind.answer(facts) for _, facts in widest]
            qas.append(QA(name, max(kind.phrasings, key=num_tokens), max(answers, key=num_tokens)))
            statements.append(max((kind.statement(facts) for _, facts in widest), key=num_tokens))
        qas.sort(key=lambda qa: -num_tokens(qa.question) - num_tokens(qa.answer))
        statements.sort(key=num_tokens, reverse=True)
        shown = [qa for qa in qas if QUESTIONS[qa.name].shown]

        context = max((_stride_text(facts, stride) for stride, facts in widest), key=num_tokens)
        documents = [self._document(_frames(0, n, 1), context, shown[:count], "") for n in (1, *lengths)]
        documents.append(self._document([], _state(statements[: count + 1]), qas[:count], ""))
        return max(len(document.tokens) for document in documents)

    def _widest_facts(self, num_volumes: int, stride: int) -> RunFacts:
        """Facts about a stretch of that length that take the most room when written out."""
        return RunFacts(
            voxel_size_mm=self.run.voxel_size_mm,
            repetition_time_s=self.run.repetition_time_s * stride,
            num_volumes=num_volumes,
            duration_s=self.run.repetition_time_s * stride * num_volumes,
            mean_signal=float(self.run.signal_XYZT.max()),
            temporal_snr=9999.9,
            drift_percent_per_min=0.0,
            drift="none",
            brightest_third="middle",
            brightest_volume=num_volumes - 1,
        )


def _split(run: FmriRun, config: DataConfig) -> int:
    """Volumes that training may show; the rest, at the end, is held out."""
    num_held_out = round(run.num_volumes * config.held_out)
    num_training = run.num_volumes - num_held_out
    if num_training < config.min_volumes or (config.held_out > 0 and num_held_out < config.min_volumes):
        shares = [share for share in (config.held_out, 1 - config.held_out) if share > 0]
        needed = math.ceil(config.min_volumes / min(shares))
        raise UserError(
            f"{run.source} has {run.num_volumes} volumes; data.held_out={config.held_out:g} and "
            f"data.min_volumes={config.min_volumes} need {needed}, so give a longer run, or change "
            "data.held_out (0 holds nothing out)",
            everywhere=True,
        )
    return num_training


def _frames(first: int, length: int, stride: int) -> list[FrameRef]:
    return [FrameRef(first, length, index, stride) for index in range(length)]


def _some(
    stretches: Sequence[tuple[int, int]], count: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """`count` of them at random, in their order; all where there are no more."""
    chosen = rng.permutation(len(stretches))[:count]
    return [stretches[i] for i in sorted(chosen)]


def _stride_text(facts: RunFacts, stride: int) -> str:
    """Says that volumes were left out, because frames cannot show it; empty where none were."""
    if stride == 1:
        return ""
    return f"One of every {stride} volumes, TR {number_text(facts.repetition_time_s)} s.\n"


def _statement(facts: RunFacts, qas: Sequence[QA], rng: np.random.Generator) -> str:
    """The facts that are asked about and one that is not, in random order."""
    others = sorted(set(askable(facts, stated=True)) - {qa.name for qa in qas})
    names = [qa.name for qa in qas]
    if others:
        names.append(others[rng.integers(len(others))])
    return _state([QUESTIONS[names[i]].statement(facts) for i in rng.permutation(len(names))])


def _state(statements: Sequence[str]) -> str:
    return f"fMRI: {'; '.join(statements)}.\n"
