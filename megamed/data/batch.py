"""Samples as tokens, and the packing of several into one row.

Shape suffixes: S tokens of a row.

A sample is a conversation in ChatML. The frames stand in the first user turn; each is one `<img>`,
its visual tokens (`<IMG_CONTEXT>`), and one `</img>`:

    <|im_start|>user
    1:<img>...</img>2:<img>...</img>
    How many volumes are there?<|im_end|>
    <|im_start|>assistant
    2<|im_end|>
    <|im_start|>user
    ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from megamed.data.tokenizer import TextTokenizer
from megamed.utils import UserError

# What the token that a position has to predict belongs to; `loss_kind_S` holds indices into this.
LOSS_KINDS = ("none", "text", "answer")
NO_LOSS, TEXT, ANSWER = range(3)

Frame: TypeAlias = Any
"""What names a frame: hashable, and understood by the source that it came from alone."""

# Up to this many frames are numbered; of more, the tags alone tell them apart, to save tokens.
NUMBERED_FRAMES = 16


@dataclass(frozen=True)
class QA:
    """A question as asked and its true answer; `name` tells what kind of question it is."""

    name: str
    question: str
    answer: str


@dataclass
class Document:
    """One sample before packing.

    Attributes:
        tokens: its token ids.
        loss_kinds: of each token, what it belongs to: an index into `LOSS_KINDS`.
        visual_positions: where the visual tokens stand, frame after frame.
        frames: the frames, in the order of their visual tokens.
        sample_id: names the sample in logs.
        specialties: which ones the sample calls, bit i for the i-th; 0 for none.
    """

    sample_id: str = ""
    tokens: list[int] = field(default_factory=list)
    loss_kinds: list[int] = field(default_factory=list)
    visual_positions: list[int] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    specialties: int = 0

    def add(self, tokens: Sequence[int], kind: int = NO_LOSS) -> None:
        """Append tokens that all belong to `kind`."""
        self.tokens.extend(tokens)
        self.loss_kinds.extend([kind] * len(tokens))


@dataclass
class Microbatch:
    """One packed row, the same on every rank of a model replica.

    Attributes:
        tokens_S: int64 token ids.
        labels_S: int64, the token after each one; without meaning where `loss_kind_S` is 0.
        loss_kind_S: uint8, what the label belongs to: an index into `LOSS_KINDS`.
        position_S: int64, counts from 0 in each document.
        cu_seqlens: int32 [number of documents + 1], bounds of the documents, from 0 to S; the padding at the
            row's end, where there is any, is the last document.
        num_real: tokens that are no padding.
        padding_S: bool, True for padding: at the row's end, and at the end of documents that are filled up.
        visual_positions: int64 [len(frames) * tokens per frame], where the visual tokens stand in the row.
        frames: the frames in the order of their visual tokens.
        sample_ids: one name a document, the padding left out.
        specialty_S: int64, which specialties each token's document calls, bit i for the i-th; 0 for padding.
    """

    tokens_S: Tensor
    labels_S: Tensor
    loss_kind_S: Tensor
    position_S: Tensor
    cu_seqlens: Tensor
    num_real: int
    padding_S: Tensor
    visual_positions: Tensor
    frames: list[Frame]
    sample_ids: list[str]
    specialty_S: Tensor

    @property
    def end(self) -> int:
        """Where the padding at the row's end begins."""
        return int(self.cu_seqlens[len(self.sample_ids)])


def prompt(
    tokenizer: TextTokenizer,
    tokens_per_frame: int,
    frames: Sequence[Frame],
    context: str,
    question: str,
    sample_id: str = "",
) -> Document:
    """The conversation up to the place where the first answer begins.

    Args:
        tokenizer: makes the text's tokens.
        tokens_per_frame: visual tokens of one frame.
        frames: what the sample shows; none for text alone.
        context: text before the frames, with its line break; empty for none.
        question: the first question.
        sample_id: names the sample.
    """
    document = Document(sample_id, frames=list(frames))
    _open_turn(document, tokenizer, "user")
    document.add(tokenizer.encode(context) if context else [], TEXT)
    for i in range(len(frames)):
        if len(frames) <= NUMBERED_FRAMES:
            document.add(tokenizer.encode(f"{i + 1}:"))
        document.add([tokenizer.img_start_id])
        start = len(document.tokens)
        document.visual_positions.extend(range(start, start + tokens_per_frame))
        document.add([tokenizer.img_context_id] * tokens_per_frame)
        document.add([tokenizer.img_end_id])
    if frames:
        document.add(tokenizer.encode("\n"))
    _ask(document, tokenizer, question)
    return document


def conversation(
    tokenizer: TextTokenizer,
    tokens_per_frame: int,
    frames: Sequence[Frame],
    context: str,
    qas: Sequence[QA],
    sample_id: str = "",
) -> Document:
    """A whole sample: frames, questions and answers. Arguments as for `prompt`.

    Context and questions count as text, answers with their `<|im_end|>` as answer; tags, visual
    tokens and the words that mark the turns carry no loss.
    """
    document = prompt(tokenizer, tokens_per_frame, frames, context, qas[0].question, sample_id)
    line_break = tokenizer.encode("\n")
    for i, qa in enumerate(qas):
        if i:
            _open_turn(document, tokenizer, "user")
            _ask(document, tokenizer, qa.question)
        document.add([*tokenizer.encode(qa.answer), tokenizer.im_end_id], ANSWER)
        document.add(line_break)
    return document


def _open_turn(document: Document, tokenizer: TextTokenizer, role: str) -> None:
    document.add([tokenizer.im_start_id, *tokenizer.encode(f"{role}\n")])


def _ask(document: Document, tokenizer: TextTokenizer, question: str) -> None:
    """The question, the end of the user's turn and the start of the assistant's."""
    document.add(tokenizer.encode(question), TEXT)
    document.add([tokenizer.im_end_id, *tokenizer.encode("\n")])
    _open_turn(document, tokenizer, "assistant")


def pack(documents: Sequence[Document], seq_length: int, pad_id: int, document_multiple: int = 1) -> Microbatch:
    """Lay documents one after another into a row and fill it up with padding.

    The last token of a document predicts nothing, so no loss crosses from one into the next.

    Args:
        documents: together at most `seq_length` tokens.
        seq_length: S, the length of the row; a multiple of `document_multiple`.
        pad_id: token id of the padding.
        document_multiple: each document is filled up to a multiple of it, with padding that counts as its own
            tokens after the last: positions go on, and nothing before it sees it.

    Raises:
        UserError: a document alone is longer than the row.
        ValueError: the documents are, together.
    """
    longest = max((len(document.tokens) for document in documents), default=0)
    if longest > seq_length:
        raise UserError(
            f"a sample has {longest} tokens and data.seq_length is {seq_length}; set data.seq_length to at "
            f"least {longest}, or lower data.max_volumes or data.questions",
            everywhere=True,
        )
    lengths = [-(-len(document.tokens) // document_multiple) * document_multiple for document in documents]
    total = sum(lengths)
    if total > seq_length:
        raise ValueError(f"{len(documents)} documents have {total} tokens, the row has {seq_length}")
    if total < seq_length:
        lengths.append(seq_length - total)
    bounds = np.concatenate([[0], np.cumsum(lengths)])

    tokens = np.full(seq_length, pad_id, dtype=np.int64)
    kinds = np.zeros(seq_length, dtype=np.uint8)
    padding = np.ones(seq_length, dtype=bool)
    specialties = np.zeros(seq_length, dtype=np.int64)
    visual: list[int] = []
    for document, start in zip(documents, bounds[:-1], strict=False):
        end = start + len(document.tokens)
        tokens[start:end] = document.tokens
        kinds[start : end - 1] = document.loss_kinds[1:]
        padding[start:end] = False
        specialties[start:end] = document.specialties
        visual.extend(int(start) + position for position in document.visual_positions)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return Microbatch(
        tokens_S=torch.from_numpy(tokens),
        labels_S=torch.from_numpy(np.append(tokens[1:], pad_id)),
        loss_kind_S=torch.from_numpy(kinds),
        position_S=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        num_real=int((~padding).sum()),
        padding_S=torch.from_numpy(padding),
        visual_positions=torch.tensor(visual, dtype=torch.int64),
        frames=[frame for document in documents for frame in document.frames],
        sample_ids=[document.sample_id for document in documents],
        specialty_S=torch.from_numpy(specialties),
    )
