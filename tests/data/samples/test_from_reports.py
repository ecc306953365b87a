"""Reports become samples of the series that they are about."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megamed.data.reports import Report
from megamed.data.samples import from_reports, parse
from megamed.data.series import SeriesInfo
from megamed.data.store import SeriesRecord


def record(series, study="s1", accession="", patient="p1", date="", **info):
    values = {"modality": "CT", "plane": "axial", "shape": (1, 40, 8, 8), **info}
    return SeriesRecord(series, patient, study, accession, date, SeriesInfo(**values), Path(), "")


RECORDS = [
    record("c", shape=(1, 20, 8, 8)), record("b", plane="coronal"), record("a"), record("d", modality="MR"),
    record("e", "s2", "a2", "p2", "20200101"), record("f", "s3", "", "p2", "20200202"),
    record("g", "s4", "", "p2", "20200303"), record("h", "s5", "", "p2", "20200303"),
    record("i", "", modality="DX", plane="none"), record("j", "", modality="DX", plane="none"),
    record("k", "", "file", ""), record("l", "", "twice", ""), record("m", "", "twice", ""),
]
SECTIONS = {"indication": "Fall.", "comparison": "None.", "technique": "CT.",
            "findings": "Clear.", "impression": "Normal."}
NONE = Report("", "", "", (), SECTIONS)


@pytest.mark.parametrize(("report", "series"), [
    (replace(NONE, study="s1"), ["a", "c", "b", "d"]),  # by modality, plane, and the longest first
    (replace(NONE, study="?", accession="a2"), ["e"]),
    (replace(NONE, images=("k2", "k1", "k2", "?")), ["j", "i"]),
    (replace(NONE, images=("?", "file")), ["k"]),  # the reader of pictures calls it by its file
    (replace(NONE, patient="p2", study_date="20200202"), ["f"]),
])
def test_a_report_finds_its_series(report, series):
    lines, unmatched = from_reports([report, report], RECORDS, {"k1": "i", "k2": "j", "k3": "gone"})
    assert unmatched == [] and len(lines) == 1
    sample = parse(json.dumps(lines[0]))
    assert [study.series for study in sample.studies] == series
    question, answer = (message.content for message in sample.messages)
    assert question.startswith("<study>" * len(series) + "Indication: Fall.\nComparison: None.\n")
    assert answer == "Findings: Clear.\nImpression: Normal."
    # Neither the order of reports nor of series matters.
    assert from_reports([report], RECORDS[::-1], {"k1": "i", "k2": "j"})[0] == lines


@pytest.mark.parametrize("report", [
    NONE, replace(NONE, study="?", accession="?"), replace(NONE, patient="p1"),
    replace(NONE, images=("k3", "k9", "twice")),
    replace(NONE, patient="p2", study_date="20200303"),  # two studies on that day
    replace(NONE, patient="p2", study_date="20200404"),
])
def test_a_report_that_could_be_of_several_studies_is_of_none(report):
    assert from_reports([report], RECORDS, {"k3": "gone"}) == ([], [report])


@pytest.mark.parametrize(("sections", "answer"), [
    ({"findings": "Clear."}, "Clear."), ({"impression": "Normal."}, "Normal."),
    ({"report": "Say <image> and <study>."}, "Say image and study."),
])
def test_the_answer_is_what_the_report_has(sections, answer):
    lines, _ = from_reports([replace(NONE, study=f"s{i}", sections=sections) for i in (1, 2, 3, 4, 5)], RECORDS)
    samples = [parse(json.dumps(line)) for line in lines]
    assert [sample.messages[1].content for sample in samples] == [answer] * 5
    assert len({sample.messages[0].content.replace("<study>", "") for sample in samples}) > 1
