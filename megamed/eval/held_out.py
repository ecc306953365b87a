"""Asks a model about data that it was never shown, and says whether the answers are right."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamed.data import Frame, HeldOutItem, MicrobatchSource, TextTokenizer
from megamed.generate import greedy
from megamed.parallel import PlacedModel, VisionPhase
from megamed.runtime import Mesh
from megamed.utils import UserError


@dataclass(frozen=True)
class Answer:
    """What the model said of one held-out item."""

    item: HeldOutItem
    text: str
    right: bool
    blank_text: str | None
    """Its answer with blank frames; None where that was not asked."""
    blank_right: bool | None


def ask_held_out(
    model: PlacedModel,
    phase: VisionPhase,
    mesh: Mesh,
    source: MicrobatchSource,
    tokenizer: TextTokenizer,
    seq_length: int,
    vocab_size: int,
    max_new_tokens: int,
    blank_control: bool,
) -> list[Answer]:
    """Decode an answer to every held-out item and judge it. Collective; the same list on every rank.

    Args:
        model, phase, mesh: the placed model, its vision phase, the layout.
        source: has the questions, with their frames and judges.
        tokenizer: of the model.
        seq_length: tokens of a packed row.
        vocab_size: of the model, without padding.
        max_new_tokens: longest answer.
        blank_control: also ask with frames that are all zero.
    """
    items = source.held_out()

    def decode(load_frames: Callable[[Sequence[Frame]], Tensor]) -> list[str]:
        tokens = greedy(
            model,
            phase,
            mesh,
            items,
            load_frames,
            seq_length,
            vocab_size,
            max_new_tokens,
            tokenizer.im_end_id,
            tokenizer.pad_id,
        )
        return [tokenizer.decode(t) for t in tokens]

    seen = decode(source.load_frames)
    blank = (
        decode(lambda frames: torch.zeros_like(source.load_frames(frames))) if blank_control else [None] * len(items)
    )

    def judged(item: HeldOutItem, text: str | None) -> bool | None:
        return None if text is None else item.judge(text)

    return [
        Answer(item, text, bool(judged(item, text)), blank_text, judged(item, blank_text))
        for item, text, blank_text in zip(items, seen, blank, strict=True)
    ]


class HeldOutEvaluation:
    """A callback that asks the held-out questions during and after training.

    Rank 0 appends one JSON object an evaluation to a file, and prints the table after the last one.

    Args:
        ask: asks all questions; collective.
        path: the JSON lines file.
        every_steps: steps between evaluations; 0 asks at the end alone.
    """

    def __init__(self, ask: Callable[[], list[Answer]], path: Path, every_steps: int):
        self.ask, self.path, self.every_steps = ask, path, every_steps
        self.step = 0

    def start(self, step: int) -> None:
        self.step = step

    def after_step(self, event: Any) -> None:
        self.step = event.step
        if self.every_steps and event.step % self.every_steps == 0:
            self._evaluate()

    def end(self) -> None:
        answers = self._evaluate()
        if dist.get_rank() == 0 and answers:
            print(table(answers), flush=True)

    def _evaluate(self) -> list[Answer]:
        answers = self.ask()
        if dist.get_rank() == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"step": self.step, **summary(answers)}) + "\n")
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error}); free space there and run again") from error
        return answers


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Right answers, asked, and right with blank frames, in all and by question."""

    def count(group: Sequence[Answer]) -> dict[str, int | None]:
        blank = [a.blank_right for a in group if a.blank_right is not None]
        return {"right": sum(a.right for a in group), "asked": len(group), "blank": sum(blank) if blank else None}

    names = dict.fromkeys(a.item.qa.name for a in answers)
    return {**count(answers), "questions": {n: count([a for a in answers if a.item.qa.name == n]) for n in names}}


def table(answers: Sequence[Answer], num_examples: int = 1) -> str:
    """A text table: how many answers are right by question, and examples of each.

    Args:
        answers: from `ask_held_out`.
        num_examples: answers shown of each question.
    """
    names = list(dict.fromkeys(a.item.qa.name for a in answers))
    control = any(a.blank_right is not None for a in answers)
    header = ["question", "right", *(["blank frames"] if control else []), "asked", "true answer", "model's answer", ""]
    rows = [header]
    for name in names:
        group = [a for a in answers if a.item.qa.name == name]
        right = f"{sum(a.right for a in group)}/{len(group)}"
        blank = [f"{sum(bool(a.blank_right) for a in group)}/{len(group)}"] if control else []
        for index, answer in enumerate(group[len(group) // 2 :][:num_examples]):
            counts = [name, right, *blank] if index == 0 else [""] * (2 + len(blank))
            said = answer.text.strip().replace("\n", " ")[:32] or "(nothing)"
            mark = "right" if answer.right else "wrong"
            rows.append([*counts, answer.item.qa.question, answer.item.qa.answer, said, mark])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    total = f"{sum(a.right for a in answers)} of {len(answers)} held-out questions answered right"
    if control:
        total += f"; {sum(bool(a.blank_right) for a in answers)} with blank frames, from memory"
    return "\n".join([*lines, total])
