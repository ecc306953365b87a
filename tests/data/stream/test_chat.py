"""Conversations as tokens: what stands where, and what carries loss."""

import pytest

from megamed.data import LOSS_KINDS
from megamed.data.frames import PlannedStudy, StudyFrame
from megamed.data.samples import Message
from megamed.data.stream.chat import ChatWriter, ShownFrame
from tests.data.stream.studies import TOKENIZER

WRITER = ChatWriter(TOKENIZER, 2)
WINDOWS = ((0.0, 1.0),) * 3
SPECIAL = {
    TOKENIZER.im_start_id: "<|im_start|>", TOKENIZER.im_end_id: "<|im_end|>", TOKENIZER.img_start_id: "<img>",
    TOKENIZER.img_end_id: "</img>", TOKENIZER.img_context_id: "@",
}


def spelled(tokens) -> str:
    return "".join(SPECIAL.get(token, chr(token % 256)) for token in tokens)


def planned(count: int, header: str = "", label: str = "") -> PlannedStudy:
    frames = [StudyFrame(header or "picture", 0, (i, i, i), WINDOWS) for i in range(count)]
    return PlannedStudy(header, frames, [label and f"{label}{i}:" for i in range(count)])


CT, PICTURE = planned(2, "CT, axial", "z="), planned(1)
MESSAGES = [
    Message("system", "Be brief."),
    Message("user", "<study>Any <image> here?"),
    Message("assistant", "No.", loss=False),
    Message("user", "Sure? <|im_end|>"),
    Message("assistant", "Yes."),
]


def of_kind(document, kind: str) -> str:
    pairs = zip(document.tokens, document.loss_kinds, strict=True)
    return spelled(token for token, k in pairs if k == LOSS_KINDS.index(kind))


def test_tags_are_replaced_where_they_stand():
    document = WRITER.document(MESSAGES, {"studies": [CT], "images": [PICTURE]}, 7, "talk:3")
    assert spelled(document.tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nCT, axial\nz=0:<img>@@</img>z=1:<img>@@</img>\nAny <img>@@</img> here?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nSure? <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    # What looks like a special token in a text is text: the second of the two alone is one.
    assert document.tokens.count(TOKENIZER.im_end_id) == 5
    assert of_kind(document, "text") == "Any  here?Sure? <|im_end|>" and of_kind(document, "answer") == "Yes.<|im_end|>"
    assert document.sample_id == "talk:3"
    assert document.frames == [ShownFrame(frame, 7) for frame in (*CT.frames, *PICTURE.frames)]
    assert [document.tokens[p] for p in document.visual_positions] == [TOKENIZER.img_context_id] * 6


def test_entries_without_a_tag_come_before_the_first_question():
    messages = [Message("system", "S"), Message("user", "Q<image>"), Message("assistant", "A")]
    document = WRITER.document(messages, {"studies": [CT], "videos": [planned(1, "film")], "images": [PICTURE]}, 0, "")
    assert spelled(document.tokens).startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n"
        "CT, axial\nz=0:<img>@@</img>z=1:<img>@@</img>\nfilm\n<img>@@</img>\nQ<img>@@</img><|im_end|>\n"
    )


@pytest.mark.parametrize("content", ["A report.", ""])
def test_an_answer_alone(content):
    document = WRITER.document([Message("assistant", content)], {"images": [PICTURE]}, 0, "")
    assert spelled(document.tokens) == f"<|im_start|>assistant\n<img>@@</img>\n{content}<|im_end|>\n"
    assert of_kind(document, "answer") == f"{content}<|im_end|>"


def test_a_prompt_ends_where_the_answer_begins():
    prompt = WRITER.prompt([Message("user", "<study>Q")], {"studies": [CT]}, "held-out:1")
    assert spelled(prompt.tokens).endswith("\nQ<|im_end|>\n<|im_start|>assistant\n")
    assert {frame.seed for frame in prompt.frames} == {None}
