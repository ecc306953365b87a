"""Samples as tokens: ChatML, with the frames of studies, films and pictures in their places.

A study's frames stand behind a line that says what is shown, each behind its label, and its visual tokens between
`<img>` and `</img>`:

    <|im_start|>user
    CT, axial, ...
    0 mm:<img>...</img>5 mm:<img>...</img>
    Any bleeding?<|im_end|>
    <|im_start|>assistant
    No.<|im_end|>

What people wrote in a user's turn counts as text, an assistant's words and their `<|im_end|>` as the answer. Tags,
visual tokens, what megamed itself says of the frames, system prompts and the words that mark turns carry no loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from megamed.data.batch import ANSWER, NO_LOSS, TEXT, Document
from megamed.data.frames import PlannedStudy, StudyFrame
from megamed.data.samples import Message
from megamed.data.samples.parse import TAGS
from megamed.data.tokenizer import TextTokenizer

_TAG = re.compile("|".join(TAGS))

_KINDS = {"system": NO_LOSS, "user": TEXT, "tool": TEXT, "assistant": ANSWER}

Shown = Mapping[str, Sequence[PlannedStudy]]
"""What a sample shows: of `studies`, `videos` and `images`, the entries in their order."""


@dataclass(frozen=True)
class ShownFrame:
    """A frame of a sample, and what its augmentation is drawn from, which is the sample's; None for none."""

    frame: StudyFrame
    seed: int | None


class ChatWriter:
    """Makes documents of conversations.

    Args:
        tokenizer: makes the text's tokens.
        tokens_per_frame: visual tokens of one frame.
    """

    def __init__(self, tokenizer: TextTokenizer, tokens_per_frame: int):
        self.tokenizer, self.tokens_per_frame = tokenizer, tokens_per_frame
        self._line_break = tokenizer.encode("\n")

    def document(self, messages: Sequence[Message], shown: Shown, seed: int | None, sample_id: str) -> Document:
        """A conversation.

        Args:
            messages: its turns.
            shown: an entry for each tag. Those of a kind that has no tag come before the first question.
            seed: of all frames.
            sample_id: names the sample.
        """
        document = Document(sample_id)
        text = "".join(message.content for message in messages)
        untagged = [shown.get(name, ()) for tag, name in TAGS.items() if tag not in text]
        tagged = {tag: iter(shown.get(name, ())) for tag, name in TAGS.items()}
        for message in messages:
            self._open_turn(document, message.role)
            if message.role != "system":
                for planned in chain(*untagged):
                    self._show(document, planned, seed)
                    if not planned.header:
                        document.add(self._line_break)
                untagged = []
            kind = NO_LOSS if message.loss is False else _KINDS[message.role]
            end = 0
            for tag in _TAG.finditer(message.content):
                self._write(document, message.content[end : tag.start()], kind)
                self._show(document, next(tagged[tag[0]]), seed)
                end = tag.end()
            self._write(document, message.content[end:], kind)
            document.add([self.tokenizer.im_end_id], kind if kind == ANSWER else NO_LOSS)
            document.add(self._line_break)
        return document

    def prompt(self, messages: Sequence[Message], shown: Shown, sample_id: str) -> Document:
        """A conversation up to the place where the next answer begins; its frames are not augmented."""
        document = self.document(messages, shown, None, sample_id)
        self._open_turn(document, "assistant")
        return document

    def _open_turn(self, document: Document, role: str) -> None:
        document.add([self.tokenizer.im_start_id, *self.tokenizer.encode(f"{role}\n")])

    def _write(self, document: Document, text: str, kind: int) -> None:
        if text:
            document.add(self.tokenizer.encode(text), kind)

    def _show(self, document: Document, planned: PlannedStudy, seed: int | None) -> None:
        if planned.header:
            document.add(self.tokenizer.encode(f"{planned.header}\n"))
        for frame, label in zip(planned.frames, planned.labels, strict=True):
            if label:
                document.add(self.tokenizer.encode(label))
            document.add([self.tokenizer.img_start_id])
            start = len(document.tokens)
            document.visual_positions.extend(range(start, start + self.tokens_per_frame))
            document.add([self.tokenizer.img_context_id] * self.tokens_per_frame)
            document.add([self.tokenizer.img_end_id])
            document.frames.append(ShownFrame(frame, seed))
        if planned.header:
            document.add(self._line_break)
