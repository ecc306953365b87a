"""The whitelist of attributes is what readers keep to, and says of each what PS3.15 says."""

import ast
from pathlib import Path

import pytest
from pydicom.datadict import tag_for_keyword

from megamed.data.privacy import profile
from megamed.data.privacy.declaration import declaration
from megamed.data.readers.dicom import header

READER = Path(header.__file__).parent


def test_the_dicom_reader_asks_for_nothing_else():
    assert len(header._TAGS) > 50
    assert [f"{tag:08X}" for tag in header._TAGS if not profile.may_read(tag)] == []


def test_nor_does_it_name_anything_else_that_may_stand_in_a_sequence():
    named = {}
    for path in READER.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                named.update(dict.fromkeys(node.value.split(), path.name))
    keywords = {name: tag for name in named if (tag := tag_for_keyword(name)) is not None}
    assert len(keywords) > 80
    assert {name: named[name] for name, tag in keywords.items() if not profile.may_read(tag)} == {}


# From Table E.1-1 of PS3.15 2024b: attributes of everyday headers that the basic profile does not let through.
@pytest.mark.parametrize("keyword", """InstitutionName InstitutionAddress ReferringPhysicianName StationName
    PerformingPhysicianName OperatorsName PatientBirthDate PatientSex PatientAge
    PatientSize PatientWeight DeviceSerialNumber StudyID ImageComments PatientComments StudyTime
    FrameOfReferenceUID RequestedProcedureDescription PerformedProcedureStepDescription
    AdditionalPatientHistory EthnicGroup Occupation DerivationDescription IssuerOfPatientID""".split())
def test_what_identifies_is_not_in_the_table(keyword):
    assert not profile.may_read(tag_for_keyword(keyword))


def test_private_attributes_only_of_known_blocks():
    assert profile.may_read(0x0019100C) and profile.may_read(0x0019110C) and profile.may_read(0x00190010)
    assert not profile.may_read(0x0019100B) and not profile.may_read(0x00091027) and not profile.may_read(0x00090010)


def test_the_table_says_what_the_standard_says():
    actions = {rule.keyword: rule.action for rule in profile.TABLE}
    assert (actions["PatientID"], actions["StudyInstanceUID"], actions["AcquisitionTime"]) == ("Z/D", "U", "X/Z")
    for rule in profile.TABLE:
        # What the basic profile takes out or blanks may only stay in another form, or under an option.
        assert not rule.action or rule.option or rule.kept == "pseudonym", rule
    assert len({rule.tag for rule in profile.TABLE}) == len(profile.TABLE)
    lines = profile.markdown().splitlines()
    assert len(lines) == 2 + len(profile.TABLE) and all(line.count("|") == 6 for line in lines)
    assert "| (0010,0020) | PatientID | Z/D | - | a keyed hash stands for it |" in lines


def test_the_declaration_names_the_methods():
    assert declaration("drop")["method_codes"] == ["113100", "113105", "113111"]
    assert declaration("shift")["dates"] == "shifted"
    assert "113107" in declaration("shift")["method_codes"]
