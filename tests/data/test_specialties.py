"""Which pools of experts a study calls, and that a row's tokens say so."""

import pytest
import torch

from megamed.data import Document, pack
from megamed.data.samples import parse
from megamed.data.series import SeriesInfo
from megamed.data.specialties import MatchRule, Specialties, Specialty, drop_specialties
from megamed.utils import UserError

CHEST = Specialty("chest", (MatchRule(["CT", "CR"], ["CHEST"]), MatchRule(body_part=["LUNG"])), ("Thorax",))
BREAST = Specialty("breast", (MatchRule(modality=["MG"]), MatchRule(body_part=["CHEST"], modality=["MG"])))
UNCALLED = Specialty("rare", (MatchRule(),))
KNOWN = Specialties([CHEST, BREAST, UNCALLED])


@pytest.mark.parametrize(
    ("modality", "body_part", "called"),
    [("CT", "CHEST", 1), ("ct", "chest", 1), ("MR", "CHEST", 0), ("MR", "LUNG", 1), ("MG", "", 2), ("MG", "LUNG", 3),
     ("OT", "", 0)],
)  # fmt: skip
def test_a_rule_holds_if_all_that_it_gives_holds(modality: str, body_part: str, called: int) -> None:
    assert KNOWN.of_series(SeriesInfo(modality=modality, body_part=body_part)) == called


def test_keywords_are_terms_or_what_stands_for_them() -> None:
    rules = (MatchRule(keywords=["Lungenembolie", "lung nodules"]), MatchRule(["MR"], keywords=["stroke"]))
    known = Specialties([Specialty("lung", rules[:1]), Specialty("stroke", rules[1:])])
    found = [
        known.of_series(SeriesInfo(modality=modality, keywords=keywords))
        for modality, keywords in (
            ("CT", ("chest", "pulmonary embolism")), ("CT", ("lung nodule",)), ("CT", ("stroke",)), ("MR", ("stroke",)),
            ("MR", ("lung nodule", "stroke")), ("MR", ()),
        )
    ]  # fmt: skip
    assert found == [1, 1, 0, 2, 3, 0]
    assert rules[0].unknown_keyword() is None
    assert MatchRule(keywords=["stroke", "strok"]).unknown_keyword() == "strok"


def test_labels_call_pools_by_name_or_label() -> None:
    assert KNOWN.of_labels(["THORAX", "breast", "general"], "") == 3
    assert Specialties().of_labels(["anything"], "") == 0, "a model without pools has nothing to call"
    with pytest.raises(UserError, match="x.jsonl:7: its specialty 'brest' is no pool's name or label; did you mean br"):
        KNOWN.of_labels(["brest"], "x.jsonl:7")


def test_a_sample_says_what_it_calls() -> None:
    turns = '"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]'
    assert parse(f"{{{turns}}}").specialties is None
    assert parse(f'{{{turns}, "specialties": "chest"}}').specialties == ("chest",)
    assert parse(f'{{{turns}, "specialties": []}}').specialties == ()
    with pytest.raises(UserError, match="specialties: are no names"):
        parse(f'{{{turns}, "specialties": [3]}}')


def row(count: int) -> list[Document]:
    return [Document(str(i), [1, 2, 3], [0, 0, 0], specialties=i % 4) for i in range(count)]


def test_every_token_has_its_documents_specialties() -> None:
    microbatch = pack(row(3), 12, 0, document_multiple=4)
    assert microbatch.specialty_S.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 2, 2, 2, 0], "padding has none"


def test_some_documents_specialties_are_withheld() -> None:
    microbatch = pack(row(400), 1200, 0)
    kept = drop_specialties(microbatch, 0.3, seed=1, index=5).specialty_S
    assert torch.equal(kept, drop_specialties(microbatch, 0.3, seed=1, index=5).specialty_S)
    assert not torch.equal(kept, drop_specialties(microbatch, 0.3, seed=1, index=6).specialty_S)
    by_document = kept.view(400, 3)
    assert (by_document == by_document[:, :1]).all(), "of a document all tokens or none"
    called = torch.arange(400) % 4 > 0
    dropped = (by_document[called, 0] == 0).float().mean()
    assert 0.2 < dropped < 0.4, "300 draws of 0.3: four standard deviations are 0.1"
    assert torch.equal(kept[kept > 0], microbatch.specialty_S[kept > 0])
    assert not drop_specialties(microbatch, 1.0, 1, 5).specialty_S.any()
    assert drop_specialties(microbatch, 0.0, 1, 5) is microbatch
