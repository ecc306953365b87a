"""Questions about a stretch of an fMRI run, their answers, and how a model's answer is judged."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megamed.data.batch import QA
from megamed.data.fmri.facts import THIRDS, RunFacts

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Question:
    """One kind of question.

    Attributes:
        phrasings: ways to ask it.
        answer: the true answer, short.
        statement: the fact as a sentence part, for samples that state it instead of showing frames.
        judge: whether an answer in a model's words is right; the tolerance stands beside each entry.
        min_volumes: volumes that the stretch needs for the question to make sense.
        shown: whether it is asked of frames, and not only where the text states it. Frames are scaled
            by the stretch and do not show the mean signal; the others are left out to keep the kinds few.
        weight: how often it is asked, relative to the others. What has to be seen is asked more often than
            what stays the same all through a run.
    """

    phrasings: tuple[str, ...]
    answer: Callable[[RunFacts], str]
    statement: Callable[[RunFacts], str]
    judge: Callable[[str, RunFacts], bool]
    min_volumes: int = 1
    shown: bool = True
    weight: float = 1.0


def number_text(value: float, at_most: int = 2) -> str:
    """`2.0`, `0.72`: at least one decimal and at most `at_most`, without trailing zeros."""
    whole, decimals = f"{value:.{at_most}f}".split(".")
    return f"{whole}.{decimals.rstrip('0') or '0'}"


def _voxel_size_text(facts: RunFacts) -> str:
    return " x ".join(number_text(size) for size in facts.voxel_size_mm) + " mm"


def _numbers(
    truth: Callable[[RunFacts], tuple[float, ...]], relative: float, absolute: float = 0.0
) -> Callable[[str, RunFacts], bool]:
    """A judge: the first numbers of the answer are the true ones within `relative` or `absolute`."""

    def judge(answer: str, facts: RunFacts) -> bool:
        wanted = truth(facts)
        given = [float(text) for text in _NUMBER.findall(answer)[: len(wanted)]]
        return len(given) == len(wanted) and all(
            abs(a - b) <= max(relative * abs(b), absolute) for a, b in zip(given, wanted, strict=True)
        )

    return judge


def _count(truth: Callable[[RunFacts], int]) -> Callable[[str, RunFacts], bool]:
    """A judge: the first number of the answer is the true one, and whole ("4.0 s" is not a count of 4)."""

    def judge(answer: str, facts: RunFacts) -> bool:
        return next(iter(_NUMBER.findall(answer)), "") == str(truth(facts))

    return judge


def _word(truth: Callable[[RunFacts], str], words: tuple[str, ...]) -> Callable[[str, RunFacts], bool]:
    """A judge: the first of `words` in the answer is the true one."""

    def judge(answer: str, facts: RunFacts) -> bool:
        given = next((word for word in _WORD.findall(answer.lower()) if word in words), "")
        return given == truth(facts)

    return judge


QUESTIONS: dict[str, Question] = {
    "voxel_size": Question(
        phrasings=("What is the voxel size?", "How large is a voxel?", "Voxel size?"),
        answer=_voxel_size_text,
        statement=lambda facts: f"voxel size {_voxel_size_text(facts)}",
        judge=_numbers(lambda facts: facts.voxel_size_mm, 0.0, 0.051),  # to a tenth of a millimetre
    ),
    "repetition_time": Question(
        phrasings=("What is the TR of these volumes?", "How far apart in time are the volumes?", "TR?"),
        answer=lambda facts: f"{number_text(facts.repetition_time_s)} s",
        statement=lambda facts: f"TR {number_text(facts.repetition_time_s)} s",
        judge=_numbers(lambda facts: (facts.repetition_time_s,), 0.01, 0.0051),  # rounding of the answer
        min_volumes=2,
    ),
    "num_volumes": Question(
        phrasings=("How many volumes are there?", "Number of volumes?", "How many volumes?"),
        answer=lambda facts: str(facts.num_volumes),
        statement=lambda facts: f"{facts.num_volumes} volumes",
        judge=_count(lambda facts: facts.num_volumes),
    ),
    "drift": Question(
        phrasings=("Does the signal drift up or down?", "Which way does the signal drift?", "Drift?"),
        answer=lambda facts: facts.drift,
        statement=lambda facts: f"drift {facts.drift}",
        judge=_word(lambda facts: facts.drift, ("up", "down", "none")),
        min_volumes=3,
        weight=3.0,
    ),
    "brightest_third": Question(
        phrasings=("Which third is brightest?", "When is the signal highest?", "Brightest third?"),
        answer=lambda facts: facts.brightest_third,
        statement=lambda facts: f"brightest third {facts.brightest_third}",
        judge=_word(lambda facts: facts.brightest_third, (*THIRDS, "none")),
        min_volumes=3,
        weight=3.0,
    ),
    "duration": Question(
        phrasings=("How long do the volumes take?", "What is the duration?", "Duration?"),
        answer=lambda facts: f"{number_text(facts.duration_s)} s",
        statement=lambda facts: f"duration {number_text(facts.duration_s)} s",
        judge=_numbers(lambda facts: (facts.duration_s,), 0.01, 0.0051),  # rounding of the answer
        min_volumes=2,
        shown=False,
    ),
    "brightest_volume": Question(
        phrasings=("Which volume is brightest, counting from 1?", "Brightest volume, from 1?"),
        answer=lambda facts: str(facts.brightest_volume + 1),
        statement=lambda facts: f"brightest volume {facts.brightest_volume + 1}",
        judge=_count(lambda facts: facts.brightest_volume + 1),
        min_volumes=3,
        shown=False,
    ),
    "temporal_snr": Question(
        phrasings=("What is the temporal SNR?", "tSNR?"),
        answer=lambda facts: number_text(facts.temporal_snr, 1),
        statement=lambda facts: f"temporal SNR {number_text(facts.temporal_snr, 1)}",
        judge=_numbers(lambda facts: (facts.temporal_snr,), 0.05, 0.051),  # stated in the text: nearly exact
        min_volumes=3,
        shown=False,
    ),
    "mean_signal": Question(
        phrasings=("What is the mean signal in the head?", "Mean signal?"),
        answer=lambda facts: number_text(facts.mean_signal, 1),
        statement=lambda facts: f"mean signal {number_text(facts.mean_signal, 1)}",
        judge=_numbers(lambda facts: (facts.mean_signal,), 0.01, 0.051),  # stated in the text: nearly exact
        shown=False,
    ),
}


def askable(facts: RunFacts, *, stated: bool = False) -> list[str]:
    """Names of the questions that make sense of a stretch.

    Args:
        facts: of the stretch.
        stated: the sample states its facts in text, so those that frames do not show can be asked too.
    """
    return [
        name
        for name, question in QUESTIONS.items()
        if facts.num_volumes >= question.min_volumes and (stated or question.shown)
    ]


@dataclass(frozen=True)
class Judge:
    """Says whether an answer in a model's words is right about a stretch.

    Attributes:
        name: of the question.
        facts: of the stretch.
    """

    name: str
    facts: RunFacts

    def __call__(self, answer: str) -> bool:
        return QUESTIONS[self.name].judge(answer, self.facts)


def ask_one(name: str, facts: RunFacts, rng: np.random.Generator) -> QA:
    """The question of that name in one of its phrasings, with its true answer."""
    question = QUESTIONS[name]
    return QA(name, question.phrasings[rng.integers(len(question.phrasings))], question.answer(facts))


def ask(facts: RunFacts, rng: np.random.Generator, k: int, *, stated: bool = False) -> list[QA]:
    """`k` questions of different kinds about a stretch, fewer where fewer make sense.

    Args:
        facts: of the stretch.
        rng: draws the kinds and the phrasings.
        k: how many.
        stated: as in `askable`.
    """
    names = askable(facts, stated=stated)
    weights = np.array([QUESTIONS[name].weight for name in names])
    chosen = rng.choice(len(names), size=min(k, len(names)), replace=False, p=weights / weights.sum())
    return [ask_one(names[i], facts, rng) for i in chosen]
