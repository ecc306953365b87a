"""Questions about series: true of what is shown, and judged by what they mean."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamed.data.frames import FramesConfig
from megamed.data.frames.plan import plan_series
from megamed.data.samples import FrameChoice, StudyRef
from megamed.data.series import SeriesInfo
from megamed.data.stream.facts import facts_of

CT = SeriesInfo(
    modality="CT", kind="volume", plane="axial", units="HU", body_part="CHEST", contrast=True, shape=(1, 30, 8, 8),
    spacing_mm=(1.0, 1.0, 2.5), percentiles={"0.5": 0.0, "99.5": 1.0},
)
ENDS = {"axial": ("feet", "head"), "coronal": ("front", "back"), "sagittal": ("right", "left")}


def asked(info: SeriesInfo, choice: FrameChoice | None = None, seed: int = 0, **config):
    planned = plan_series(info, Path("voxels.npy"), StudyRef("", frames=choice), FramesConfig(**config))
    return planned, {a.qa.name: a for a in facts_of(info, planned.frames, np.random.default_rng(seed))}


def test_kinds_that_make_sense():
    _, whole = asked(replace(CT, shape=(1, 31, 8, 8)), FrameChoice(at_most=7))
    assert set(whole) == {"modality", "plane", "num_slices", "spacing", "body_part", "order", "extreme", "contrast"}
    _, one = asked(CT, FrameChoice(range_mm=(0, 1)))
    assert set(one) == {"modality", "plane", "num_slices", "body_part", "half", "contrast"}
    _, picture = asked(SeriesInfo(modality="DX", view_position="PA", shape=(1, 1, 8, 8), percentiles=CT.percentiles))
    assert set(picture) == {"modality", "view"}
    run = replace(CT, kind="run", shape=(6, 4, 8, 8), repetition_time_s=2.5, contrast=None, modality="MR", units="a.u.")
    _, mosaics = asked(run)
    assert set(mosaics) == {"modality", "plane", "body_part", "repetition_time"}
    assert mosaics["repetition_time"].qa.answer == "2.50 s"
    assert asked(SeriesInfo(shape=(1, 1, 8, 8), percentiles=CT.percentiles))[1] == {}


@pytest.mark.parametrize("plane", ENDS)
@pytest.mark.parametrize("seed", range(12))
def test_answers_are_true_of_the_slices_shown(plane, seed):
    """Read again from the labels beside the frames, which say where each lies."""
    info = replace(CT, plane=plane)
    low = 2.5 * (seed % 3) * 10
    planned, facts = asked(info, FrameChoice(range_mm=(low, low + 30), every=1 + seed % 2, at_most=6), seed)
    z = [float(re.findall(r"z=([\d.]+) mm", label)[0]) for label in planned.labels]
    assert facts["num_slices"].qa.answer == str(len(z))
    first, second = ENDS[plane]
    order = facts["order"].qa
    a, b = (int(n) for n in re.findall(r"\d+", order.question))
    towards = 1 if second in order.question else -1
    assert order.answer == str(a if towards * z[a - 1] > towards * z[b - 1] else b)
    extreme = facts["extreme"].qa
    wanted = max(z) if second in extreme.question else min(z)
    assert z[int(extreme.answer) - 1] == wanted
    gaps = np.diff(z)
    assert ("spacing" in facts) == bool(gaps.max() - gaps.min() < 0.05)
    if "spacing" in facts:
        assert facts["spacing"].qa.answer == f"{gaps[0]:.1f} mm"
    half = {0.0: first, 50.0: second}.get(low)
    assert (facts["half"].qa.answer if "half" in facts else None) == half


def test_irregular_stacks_are_measured_by_their_positions():
    info = replace(CT, shape=(1, 4, 8, 8), slice_positions_mm=(0.0, 1.0, 2.0, 9.0))
    assert "spacing" not in asked(info)[1]
    assert asked(info, FrameChoice(range_mm=(0, 2)))[1]["spacing"].qa.answer == "1.0 mm"
    assert asked(info, FrameChoice(range_mm=(5, 9)))[1]["half"].qa.answer == "head"


@pytest.mark.parametrize(("name", "right", "wrong"), [
    ("modality", ["CT", "It is a CT scan."], ["MR", "", "PET/CT"]),
    ("plane", ["axial", "Axial slices."], ["coronal", "not known"]),
    ("num_slices", ["7", "There are 7."], ["8", "7.5", "seven"]),
    ("spacing", ["12.5 mm", "12.5", "12.46 mm"], ["12.6 mm", "2.5", ""]),
    ("contrast", ["yes", "Yes, it was."], ["no", "no, yes"]),
    ("body_part", ["chest", "The chest."], ["head", ""]),
])
def test_judges(name, right, wrong):
    info = replace(CT, shape=(1, 31, 8, 8))
    _, facts = asked(info, FrameChoice(at_most=7))
    judge = facts[name].judge
    assert judge(facts[name].qa.answer)
    assert [judge(text) for text in right] == [True] * len(right)
    assert [judge(text) for text in wrong] == [False] * len(wrong)


def test_phrasings_and_slices_are_drawn():
    questions = {tuple(a.qa.question for a in asked(CT, seed=seed)[1].values()) for seed in range(8)}
    assert len(questions) == 8
    assert asked(CT, seed=3)[1]["order"].qa == asked(CT, seed=3)[1]["order"].qa
