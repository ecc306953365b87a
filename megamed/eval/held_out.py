"""Asks a model about data that it was never shown, and says whether the answers are right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamed.data import QUESTIONS, FrameRef, HeldOutItem, TextTokenizer
from megamed.generate import greedy
from megamed.parallel import PlacedModel, VisionPhase
from megamed.runtime import Mesh


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
    items: Sequence[HeldOutItem],
    load: Callable[[Sequence[FrameRef]], Tensor],
    tokenizer: TextTokenizer,
    seq_length: int,
    vocab_size: int,
    max_new_tokens: int,
    blank_control: bool,
) -> list[Answer]:
    """Decode an answer to every item and judge it. Collective; the same list on every rank.

    Args:
        model, phase, mesh: the placed model, its vision phase, the layout.
        items: the questions, with their frames and facts.
        load: frames of some references.
        tokenizer: of the model.
        seq_length: tokens of a packed row.
        vocab_size: of the model, without padding.
        max_new_tokens: longest answer.
        blank_control: also ask with frames that are all zero.
    """

    def decode(load_frames: Callable[[Sequence[FrameRef]], Tensor]) -> list[str]:
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

    seen = decode(load)
    blank = decode(lambda frames: torch.zeros_like(load(frames))) if blank_control else [None] * len(items)

    def judged(item: HeldOutItem, text: str | None) -> bool | None:
        return None if text is None else QUESTIONS[item.qa.name].judge(text, item.facts)

    return [
        Answer(item, text, bool(judged(item, text)), blank_text, judged(item, blank_text))
        for item, text, blank_text in zip(items, seen, blank, strict=True)
    ]


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
