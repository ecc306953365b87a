"""Terms of descriptions: found by any of their spellings, the longest first, and nothing else of the text."""

import pytest

from megamed.data import keywords
from megamed.data.keywords import find_keywords, term_of, terms


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CT LUNG_NODULE follow-up", ("follow up", "lung nodule")),
        ("lung, nodule", ("lung nodule",)),
        ("nodule of the lung", ("lung", "nodule")),
        ("Schädel-MRT bei Schlaganfall", ("brain", "stroke")),
        ("SCHADEL", ("brain",)),
        ("IRM crâne", ("brain",)),
        ("CTPA 20140425", ("pulmonary embolism",)),
        ("CTA MRA DWI FLAIR HRCT KUB", ("angiography", "diffusion", "flair", "lung", "urinary tract")),
        ("V.a. Lungenembolie, Frau Wrzesniewskaja", ("pulmonary embolism",)),
        ("T2W FLAIR", ("flair", "t2")),
        ("T2WFLAIR kneecap", ()),
        ("Knie li.", ("knee",)),
        ("Müßig Fuß", ("foot",)),
        ("SCHAEDEL Huefte", ("brain", "hip")),
        ("CŒUR", ("cardiac",)),
        ("lung\u2013nodule\u00a0CT", ("lung nodule",)),
        ("hip fractures, CTAs", ("angiography", "fracture", "hip")),
        ("01_ThoraxRoutine fMRI", ("chest", "fmri")),
        ("CT HEAD W/O CONTRAST", ("head", "without contrast")),
        ("NCCT", ("without contrast",)),
        ("Abdomen mit und ohne KM", ("abdomen", "contrast")),
        ("ABD/PELVIS W & W/O CONTRAST", ("abdomen", "contrast", "pelvis")),
        ("mesenteric ischemia", ("ischaemia",)),
        ("næse kneeø", ()),
        ("", ()),
    ],
)
def test_terms_are_whole_words(text: str, found: tuple[str, ...]) -> None:
    assert find_keywords([text]) == found


def test_several_texts_are_several_descriptions() -> None:
    assert find_keywords(["lung", "nodule", "lung"]) == ("lung", "nodule")


def test_nothing_comes_out_that_is_not_in_the_list() -> None:
    listed = set(terms().values())
    assert 200 < len(listed) < 300
    for term in listed:
        assert find_keywords([f"Doe^Jane {term} 1937"]) == (term,), "a term is found by its own name, and alone"
        assert term_of(term.upper()) == term
    assert term_of("Doe") is None


def test_every_spelling_is_found_as_its_term() -> None:
    for spelling, term in terms().items():
        assert find_keywords([spelling]) == (term,), spelling
    listed = [line.partition(":") for line in keywords.listing().splitlines()]
    assert [term for term, _, _ in listed] == sorted(terms[0] for terms in listed)
    assert all(term_of(other) == term for term, _, others in listed for other in others.split(",") if other)


def test_a_spelling_stands_for_one_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keywords, "_LIST", "lung: lunge\nliver: lunge")
    keywords.terms.cache_clear()
    with pytest.raises(ValueError, match="'lunge' stands for 'lung' and 'liver'"):
        keywords.terms()
    monkeypatch.undo()
    keywords.terms.cache_clear()
