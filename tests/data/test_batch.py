"""Documents and packed rows: what is where, and what carries loss."""

import numpy as np
import pytest
import torch

from megamed.data import LOSS_KINDS, QA, Document, FrameRef, conversation, load_tokenizer, pack, prompt
from megamed.data.batch import NUMBERED_FRAMES
from megamed.utils import UserError

TOKENS_PER_FRAME = 4
TOKENIZER = load_tokenizer("bytes")
FRAMES = [FrameRef(first=3, num_volumes=2, index=i) for i in range(2)]
QAS = [QA("num_volumes", "How many?", "2"), QA("drift", "Drift?", "up")]


def spelled(tokens) -> str:
    """Tokens as text, the special ones by name."""
    names = {
        TOKENIZER.pad_id: "<pad>",
        TOKENIZER.im_start_id: "<|im_start|>",
        TOKENIZER.im_end_id: "<|im_end|>",
        TOKENIZER.img_start_id: "<img>",
        TOKENIZER.img_end_id: "</img>",
        TOKENIZER.img_context_id: "@",
    }
    return "".join(names.get(int(token), chr(int(token) % 256)) for token in tokens)


def two_frames() -> Document:
    return conversation(TOKENIZER, TOKENS_PER_FRAME, FRAMES, "Shown.\n", QAS, "two")


def text_only() -> Document:
    return conversation(TOKENIZER, TOKENS_PER_FRAME, [], "fMRI.\n", QAS[1:], "text")


def test_conversation_reads_as_chat():
    assert spelled(two_frames().tokens) == (
        "<|im_start|>user\nShown.\n1:<img>@@@@</img>2:<img>@@@@</img>\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nDrift?<|im_end|>\n<|im_start|>assistant\nup<|im_end|>\n"
    )
    assert spelled(text_only().tokens) == (
        "<|im_start|>user\nfMRI.\nDrift?<|im_end|>\n<|im_start|>assistant\nup<|im_end|>\n"
    )


def test_each_token_belongs_to_its_kind():
    document = two_frames()

    def of_kind(name: str) -> str:
        kind = LOSS_KINDS.index(name)
        return spelled(t for t, k in zip(document.tokens, document.loss_kinds, strict=True) if k == kind)

    assert of_kind("text") == "Shown.\nHow many?Drift?"
    assert of_kind("answer") == "2<|im_end|>up<|im_end|>"


def test_prompt_is_the_start_of_the_conversation():
    document = two_frames()
    start = prompt(TOKENIZER, TOKENS_PER_FRAME, FRAMES, "Shown.\n", QAS[0].question)
    assert document.tokens[: len(start.tokens)] == start.tokens
    assert spelled(start.tokens).endswith("How many?<|im_end|>\n<|im_start|>assistant\n")
    assert start.visual_positions == document.visual_positions and start.frames == FRAMES


def test_many_frames_are_not_numbered():
    many = [FrameRef(0, NUMBERED_FRAMES + 1, i) for i in range(NUMBERED_FRAMES + 1)]
    text = spelled(prompt(TOKENIZER, 1, many, "", "Drift?").tokens)
    assert text.startswith("<|im_start|>user\n" + "<img>@</img>" * len(many) + "\nDrift?")


def test_packed_row():
    documents = [two_frames(), text_only(), two_frames()]
    num_real = sum(len(document.tokens) for document in documents)
    row = pack(documents, num_real + 10, TOKENIZER.pad_id)
    for tensor, dtype in (
        (row.tokens_S, torch.int64),
        (row.labels_S, torch.int64),
        (row.loss_kind_S, torch.uint8),
        (row.position_S, torch.int64),
        (row.cu_seqlens, torch.int32),
        (row.visual_positions, torch.int64),
    ):
        assert tensor.dtype == dtype
    assert row.num_real == num_real and row.sample_ids == ["two", "text", "two"]
    assert spelled(row.tokens_S) == "".join(spelled(d.tokens) for d in documents) + "<pad>" * 10

    # The padding is the last document, and positions start again in each.
    lengths = [*(len(document.tokens) for document in documents), 10]
    assert torch.equal(row.cu_seqlens, torch.tensor([0, *lengths]).cumsum(0).int())
    assert torch.equal(row.position_S, torch.cat([torch.arange(n) for n in lengths]))

    # Visual tokens: the right ones, frame after frame.
    assert len(row.visual_positions) == len(row.frames) * TOKENS_PER_FRAME
    is_visual = row.tokens_S == TOKENIZER.img_context_id
    assert torch.equal(row.visual_positions, is_visual.nonzero().flatten())
    assert row.frames == FRAMES + FRAMES

    # Labels are the next tokens, and those of each kind spell what is to be learned.
    assert torch.equal(row.labels_S[:-1], row.tokens_S[1:])
    answers, texts = row.labels_S[row.loss_kind_S == 2], row.labels_S[row.loss_kind_S == 1]
    assert spelled(answers) == "2<|im_end|>up<|im_end|>" "up<|im_end|>" "2<|im_end|>up<|im_end|>"
    assert spelled(texts) == "Shown.\nHow many?Drift?" "fMRI.\nDrift?" "Shown.\nHow many?Drift?"


def test_documents_filled_up_to_a_multiple():
    documents = [two_frames(), Document("full", [65] * 8, [2] * 8), text_only()]
    lengths = [len(document.tokens) for document in documents]
    filled = [-(-length // 8) * 8 for length in lengths]
    assert filled[1] == lengths[1] and filled[0] > lengths[0] and filled[2] > lengths[2]
    row = pack(documents, sum(filled) + 16, TOKENIZER.pad_id, document_multiple=8)
    plain = pack(documents, sum(filled) + 16, TOKENIZER.pad_id)

    assert row.cu_seqlens.tolist() == [0, *np.cumsum([*filled, 16])]
    assert row.end == sum(filled) and plain.end == sum(lengths)
    assert row.num_real == plain.num_real == sum(lengths)
    # Without the padding it is the row without filling up: same tokens, positions, labels and kinds.
    assert torch.equal(row.tokens_S == TOKENIZER.pad_id, row.padding_S)
    assert torch.equal(plain.padding_S, torch.arange(len(plain.tokens_S)) >= plain.end)
    for name in ("tokens_S", "position_S", "loss_kind_S"):
        assert torch.equal(getattr(row, name)[~row.padding_S], getattr(plain, name)[: plain.end]), name
    labelled = row.loss_kind_S > 0
    assert torch.equal(row.labels_S[labelled], plain.labels_S[plain.loss_kind_S > 0])
    assert not (labelled & row.padding_S).any() and not row.padding_S[1:][labelled[:-1]].any()
    assert torch.equal(row.position_S, torch.cat([torch.arange(length) for length in [*filled, 16]]))
    assert torch.equal(row.visual_positions, (row.tokens_S == TOKENIZER.img_context_id).nonzero().flatten())
    with pytest.raises(ValueError, match=f"3 documents have {sum(filled)} tokens"):
        pack(documents, sum(lengths), TOKENIZER.pad_id, document_multiple=8)


def test_no_loss_across_documents_or_on_tags_and_padding():
    # A document of nothing but loss, on either side of a border.
    full = Document("full", [65] * 5, [2] * 5)
    row = pack([full, full], 12, TOKENIZER.pad_id)
    assert row.loss_kind_S.tolist() == [2, 2, 2, 2, 0, 2, 2, 2, 2, 0, 0, 0]
    row = pack([two_frames(), text_only()], 300, TOKENIZER.pad_id)
    silent = (TOKENIZER.pad_id, TOKENIZER.img_start_id, TOKENIZER.img_end_id, TOKENIZER.img_context_id)
    assert not torch.isin(row.labels_S[row.loss_kind_S > 0], torch.tensor(silent)).any()


def test_row_without_padding_and_without_frames():
    document = text_only()
    row = pack([document], len(document.tokens), TOKENIZER.pad_id)
    assert row.cu_seqlens.tolist() == [0, len(document.tokens)] and row.num_real == len(document.tokens)
    assert row.visual_positions.shape == (0,) and row.frames == []


def test_too_long():
    document = two_frames()
    length = len(document.tokens)
    with pytest.raises(UserError, match=rf"has {length} tokens and data.seq_length is {length - 1}; .*least {length}"):
        pack([document], length - 1, TOKENIZER.pad_id)
    with pytest.raises(ValueError, match="2 documents"):
        pack([document, document], 2 * length - 1, TOKENIZER.pad_id)
