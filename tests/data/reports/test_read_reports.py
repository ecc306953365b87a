"""Reports of every format come out alike, with pseudonyms and scrubbed; what cannot be used is named by its line."""

import csv
import json
import pickle

import pytest

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Refusal
from megamed.data.reports import can_read, image_keys, image_names, read

PSEUDONYMS = Pseudonyms(bytes(range(32)), "shift")
UID, NUMBER, PATIENT = "1.2.840.99.5", "AC-778899", "P0012345"
SECTIONS = {"indication": "Fall of ___.", "findings": "No bleed. Seen by Dr. ___.", "impression": "Normal."}
FIELDS = {"StudyInstanceUID": UID, "Accession Number": NUMBER, "patient_id": PATIENT, "PatientName": "Doe^Jane",
          "study_date": "20190314", "indication": "Fall of Jane Doe.", "FINDINGS": "No bleed. Seen by Dr. Roe.",
          "Impression": "Normal.", "label_covid": "Normal", "filename": "a/b/CXR1_IM-1.dcm.png"}
XML = """<?xml version="1.0"?><eCitation><uId id="CXR1"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">Fall of XXXX.</AbstractText>
<AbstractText Label="FINDINGS">Heart &lt; normal.</AbstractText><AbstractText Label="IMPRESSION"/>
</Abstract></Article></MedlineCitation><parentImage id="CXR1_IM-1"><figureId>F1</figureId></parentImage>
<parentImage id="CXR1_IM-2"/></eCitation>"""


def write_csv(path, rows, mark=",", encoding="utf-8"):
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)


def readable(path):
    return can_read(path, path.read_bytes()[:1024])


@pytest.mark.parametrize(("name", "write"), [
    ("a.json", lambda path: path.write_text(json.dumps(FIELDS))),
    ("a.json", lambda path: path.write_text(json.dumps([FIELDS], indent=1), encoding="utf-8-sig")),
    ("a.json", lambda path: path.write_text(json.dumps(FIELDS) + "\n\n")),
    ("a.jsonl", lambda path: path.write_text(json.dumps({"filler": "x" * 2000, **FIELDS}) + "\n")),
    ("a.csv", lambda path: write_csv(path, [FIELDS])),
    ("A.CSV", lambda path: write_csv(path, [FIELDS], ";", "utf-8-sig")),
    ("a.tsv", lambda path: write_csv(path, [FIELDS], "\t")),
])
def test_formats(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    assert readable(path)
    reading = read(path, PSEUDONYMS)
    assert reading.refused == []
    (report,) = pickle.loads(pickle.dumps(reading.reports))
    assert report.sections == SECTIONS
    assert (report.study, report.accession, report.patient) == (
        PSEUDONYMS.of("study", UID), PSEUDONYMS.of("accession", NUMBER), PSEUDONYMS.of("patient", PATIENT))
    assert report.study_date == PSEUDONYMS.date(PATIENT, "20190314") != ""
    # By the name that the reader of pictures gives it, and without any ending.
    assert report.images[1:] == tuple(PSEUDONYMS.of("accession", name) for name in ("CXR1_IM-1.dcm", "CXR1_IM-1"))
    assert report.path == path and report.line == (2 if "sv" in name.lower() else 1)


def test_open_i(tmp_path):
    path = tmp_path / "1.xml"
    path.write_text(XML)
    assert readable(path)
    (report,) = read(path, PSEUDONYMS).reports
    assert report.sections == {"indication": "Fall of XXXX.", "comparison": "None.", "findings": "Heart < normal."}
    assert report.study == PSEUDONYMS.of("study", "CXR1")
    assert report.images == (image_keys(PSEUDONYMS, "CXR1_IM-1.png")[1], image_keys(PSEUDONYMS, "x\\CXR1_IM-2.JPG")[1])


@pytest.mark.parametrize(("text", "sections"), [
    ("                 FINAL REPORT\n EXAMINATION:  CHEST\n\n INDICATION:  Cough.\n\n FINDINGS: \n\n Lungs: clear.\n "
     "HEART: normal.\n\n IMPRESSION:\n\n No pneumonia.\n\n RECOMMENDATION(S):  None.",
     {"indication": "Cough.", "findings": "Lungs: clear.\n HEART: normal.",
      "impression": "No pneumonia.\nNone."}),
    ("CLINICAL HISTORY: Cough. TECHNIQUE: CT. FINDINGS: Clear. IMPRESSION: Normal. RECOMMENDATION: None.",
     {"indication": "Cough.", "technique": "CT.", "findings": "Clear.", "impression": "Normal.\nNone."}),
    ("Findings and impression: Clear lungs", {"findings": "Clear lungs"}),
    ("Lungs are clear: no findings.", {"report": "Lungs are clear: no findings."}),
])
def test_the_text_of_all_is_split_at_its_headings(tmp_path, text, sections):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"study_id": 50414267, "text": text}))
    (report,) = read(path, PSEUDONYMS).reports
    assert report.sections == sections and report.study == PSEUDONYMS.of("study", "s50414267")


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", {"Modality": "MR", "ImageComments": "x", "PatientID": "P", "ProtocolName": "y"}),
    ("a.jsonl", {"messages": [{"role": "user", "content": "findings"}], "images": ["a.png"]}),
    ("a.json", {"text": "a story"}), ("a.csv", "onset,duration\n1,2"), ("people.tsv", "participant_id\tage\n1\t2"),
    ("a.xml", "<svg/>"), ("a.txt", "findings"), ("a.csv", ""), ("a.json", "12"), ("a.csv", b"\xff\xfe\0\0" * 9),
])
def test_other_files_are_none_of_ours(tmp_path, name, content):
    path = tmp_path / name
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert not readable(path)
    assert not can_read(tmp_path / "gone.json", b"{")


def test_bad_entries_are_refused_alone(tmp_path):
    good = json.dumps(FIELDS)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, "", "{SECRET", '"SECRET"', '{"findings": "SECRET"}', '{"study": "SECRET"}',
                               '{"findings": "x", "patient": {"id": "SECRET"}}', '{"findings": " ", "study": "1"}',
                               '{"indication": "x", "study": "1"}',
                               json.dumps({"study": 1, "text": "x" * 1_100_000}), good]))
    reports, refused = read(path, PSEUDONYMS)
    assert [report.line for report in reports] == [1, 11]
    assert [(line, refusal.code) for line, refusal in refused] == [
        (3, "report-json"), (4, "report-json"), (5, "report-of-nothing"), (6, "report-empty"), (7, "report-nested"),
        (8, "report-empty"), (9, "report-empty"), (10, "report-too-long"),
    ]
    assert not any("SECRET" in str(refusal) for _, refusal in refused)


def test_rows_of_several_lines_are_named_by_their_first(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('accession;report\n1;"FINDINGS:\nclear; ""dry"""\n2;a;b\n\n3;\n4;ok\n')
    reports, refused = read(path, PSEUDONYMS)
    assert [(report.line, report.sections) for report in reports] == [
        (2, {"findings": 'clear; "dry"'}), (7, {"report": "ok"})]
    assert [(line, refusal.code) for line, refusal in refused] == [(4, "report-columns"), (6, "report-empty")]


@pytest.mark.parametrize(("name", "content", "code"), [
    ("a.json", b'[{"findings": 1},\n{', "report-json"), ("a.json", b"[" * 100_000, "report-json"),
    ("a.csv", b'study,findings\n1,"SECRET', "report-csv"),
    ("a.csv", "study,findings\n1,Größe".encode("latin-1"), "report-encoding"),
    ("a.csv", b"a,b\n1,2", "report-columns"), ("a.csv", b"study,findings\n1," + b"x" * (1 << 22), "report-line"),
    ("a.jsonl", b'{"findings": "' + b"x" * (1 << 22), "report-line"),
    ("a.xml", b"<eCitation><a></eCitation>", "report-xml"), ("a.xml", b"<eCitations/>", "report-xml"),
    ("a.xml", b'<!DOCTYPE x [<!ENTITY a "SECRET"><!ENTITY b "&a;&a;">]><eCitation>&b;</eCitation>', "report-xml"),
    ("a.xml", b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><eCitation>&a;</eCitation>', "report-xml"),
    ("a.xml", b'<?xml version="1.0" encoding="none"?><eCitation/>', "report-xml"),
    ("a.xml", b"<eCitation>" + b" " * (1 << 24), "report-too-large"),
])
def test_files_that_cannot_be_read(tmp_path, name, content, code):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Refusal) as caught:
        read(path, PSEUDONYMS)
    assert caught.value.code == code and "SECRET" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_names_of_pictures_that_several_series_have_say_nothing():
    files = [("a/I10", "s1"), ("b/I10", "s2"), ("b/x.y.PNG", "s3"), ("c/x.y.dcm", "s3"), ("d/I10.dcm", "s1")]
    named = {"x.y": "s3", "x.y.PNG": "s3", "x.y.dcm": "s3", "I10.dcm": "s1"}
    assert image_names(files, PSEUDONYMS) == {PSEUDONYMS.of("accession", key): name for key, name in named.items()}
