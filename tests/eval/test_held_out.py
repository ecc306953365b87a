"""Answers are judged against what was measured, and counted by question."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megamed.data import DataConfig, FmriSource, load_tokenizer, read_run
from megamed.eval import Answer, HeldOutEvaluation, summary, table


def items() -> Any:
    run = read_run("nibabel:functional.nii")
    return FmriSource(run, DataConfig(), load_tokenizer("bytes"), image_size=56, tokens_per_frame=4).held_out()


def answered(text_of: Any, blank_of: Any) -> list[Answer]:
    answers = []
    for item in items():
        text, blank = text_of(item), blank_of(item)
        answers.append(Answer(item, text, item.judge(text), blank, item.judge(blank)))
    return answers


def test_true_answers_are_right_and_nonsense_is_not() -> None:
    answers = answered(lambda item: item.qa.answer, lambda item: "no idea")
    assert len(answers) > 20
    assert all(a.right and not a.blank_right for a in answers)
    counts = summary(answers)
    assert counts["right"] == counts["asked"] == len(answers) and counts["blank"] == 0
    assert sum(q["asked"] for q in counts["questions"].values()) == len(answers)


def test_table_shows_each_question_with_truth_answer_and_control() -> None:
    rng = np.random.default_rng(0)
    answers = answered(lambda item: item.qa.answer if rng.random() < 0.5 else "", lambda item: item.qa.answer)
    text = table(answers)
    for name in {a.item.qa.name for a in answers}:
        group = [a for a in answers if a.item.qa.name == name]
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{sum(a.right for a in group)}/{len(group)}" in line
        assert line.endswith(("right", "wrong"))
    right = sum(a.right for a in answers)
    assert f"{right} of {len(answers)} held-out questions answered right; {len(answers)} with blank frames" in text


def evaluate(path: str) -> None:
    asked = []

    def ask() -> list[Answer]:
        asked.append(True)
        return answered(lambda item: item.qa.answer, lambda item: "")

    callback = HeldOutEvaluation(ask, Path(path), every_steps=2)
    callback.start(3)

    class Event:
        step = 4

    callback.after_step(Event())
    Event.step = 5
    callback.after_step(Event())
    callback.end()
    assert len(asked) == 2


def test_callback_asks_when_due_and_at_the_end(ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    ranks.run(evaluate, 2, str(path))  # two ranks, one writer
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5]
    assert lines[0]["right"] == lines[0]["asked"]
