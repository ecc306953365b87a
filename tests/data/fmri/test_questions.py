"""Questions have true answers, and judges know them from wrong ones."""

import dataclasses

import numpy as np
import pytest

from megamed.data import QUESTIONS, RunFacts, ask
from megamed.data.fmri.questions import askable, number_text

FACTS = RunFacts(
    voxel_size_mm=(4.0, 4.0, 8.0),
    repetition_time_s=2.0,
    num_volumes=7,
    duration_s=14.0,
    mean_signal=3644.93,
    temporal_snr=106.96,
    drift_percent_per_min=1.6,
    drift="up",
    brightest_third="middle",
    brightest_volume=4,
)
OTHER = RunFacts(
    voxel_size_mm=(3.0, 3.0, 3.3),
    repetition_time_s=0.72,
    num_volumes=5,
    duration_s=3.6,
    mean_signal=331.5,
    temporal_snr=80.1,
    drift_percent_per_min=0.0,
    drift="none",
    brightest_third="first",
    brightest_volume=0,
)


def test_answers():
    answers = {name: question.answer(FACTS) for name, question in QUESTIONS.items()}
    assert answers == {
        "voxel_size": "4.0 x 4.0 x 8.0 mm",
        "repetition_time": "2.0 s",
        "num_volumes": "7",
        "drift": "up",
        "brightest_third": "middle",
        "duration": "14.0 s",
        "brightest_volume": "5",
        "temporal_snr": "107.0",
        "mean_signal": "3644.9",
    }


@pytest.mark.parametrize("name", QUESTIONS)
def test_judge_takes_the_true_answer_and_no_other(name):
    judge = QUESTIONS[name].judge
    for facts, wrong in ((FACTS, OTHER), (OTHER, FACTS)):
        assert judge(QUESTIONS[name].answer(facts), facts)
        assert not judge(QUESTIONS[name].answer(wrong), facts)
    assert not judge("", FACTS) and not judge("I do not know", FACTS)


@pytest.mark.parametrize(
    "name, text, right",
    [
        ("voxel_size", "It is 4 x 4 x 8 mm.", True),
        ("voxel_size", "4.0 x 4.0 mm", False),
        ("voxel_size", "4.0 x 4.0 x 8.2 mm", False),
        ("voxel_size", "8.0 x 4.0 x 4.0 mm", False),
        ("repetition_time", "TR = 2.01 s", True),
        ("repetition_time", "2.1 s", False),
        ("num_volumes", "There are 7 volumes", True),
        ("num_volumes", "7.0 s", False),
        ("num_volumes", "17", False),
        ("drift", "Up.", True),
        ("drift", "down, not up", False),
        ("drift", "upwards", False),
        ("brightest_third", "the MIDDLE third", True),
        ("brightest_third", "first", False),
        ("brightest_volume", "5", True),
        ("brightest_volume", "4", False),
    ],
)
def test_judge_reads_a_models_words(name, text, right):
    assert QUESTIONS[name].judge(text, FACTS) is right


def test_one_volume_is_asked_only_what_it_shows():
    single = dataclasses.replace(FACTS, num_volumes=1)
    assert askable(single) == ["voxel_size", "num_volumes"]
    assert "mean_signal" not in askable(FACTS) and "mean_signal" in askable(FACTS, stated=True)


def test_ask_draws_different_kinds_and_phrasings():
    qas = ask(FACTS, np.random.default_rng(0), 3)
    assert len({qa.name for qa in qas}) == 3
    assert qas == ask(FACTS, np.random.default_rng(0), 3)
    assert len(ask(FACTS, np.random.default_rng(0), 99)) == len(askable(FACTS))
    seen = {qa for seed in range(300) for qa in ask(FACTS, np.random.default_rng(seed), 3)}
    for name in askable(FACTS):
        assert {qa.question for qa in seen if qa.name == name} == set(QUESTIONS[name].phrasings)
        assert {qa.answer for qa in seen if qa.name == name} == {QUESTIONS[name].answer(FACTS)}


def test_statements_hold_the_answer():
    for question in QUESTIONS.values():
        assert question.answer(FACTS) in question.statement(FACTS)


@pytest.mark.parametrize("value, text", [(2.0, "2.0"), (0.72, "0.72"), (3.296, "3.3"), (14.004, "14.0")])
def test_number_text(value, text):
    assert number_text(value) == text
