"""What identifies people, taken out of the text of reports: a best effort, on the careful side.

Rules cannot find every name. What they find is what has a form (dates, numbers, addresses of the network) or stands
where names stand (after a title, before a degree, after "signed by"), and what the report's own record tells (the
patient's name and numbers, the physicians). A name in the middle of a sentence that the record does not tell stays. So
whoever trains on reports should have them de-identified at their source, and take this for a second net. Words that
look like one of these forms are lost along with them; measurements, levels (L4/5) and grades stay.

`[** ... **]` of MIMIC-II and III becomes `___`, which MIMIC-CXR has; Open-i's `XXXX` stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BLANK = "___"

_MONTH = (r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|june?|july?|aug(?:ust)?|sept?(?:ember)?|"
          r"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?")
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
# A name: an initial, or a word that begins with a capital letter, with particles and hyphens.
_NAME = r"(?:(?:van|von|der|den|de|del|la|le|di|bin|al)\s+)*(?:[A-Z]\.|[A-Z\u00c0-\u00de][\w\u2019'-]+)"
_NAMES = rf"{_NAME}(?:[ \t]+{_NAME}){{0,2}}"
_DEGREE = r"(?:M\.?D\.?|D\.O\.|Ph\.?D\.?|MBBS|MBChB|FRCR|FRCPC|FACR)"
_SIGNED = (r"(?:electronically\s+signed|signed|dictated|transcribed|reported|read|reviewed|approved|verified|"
           r"interpreted|finali[sz]ed|authenticated)(?:\s+(?:and|&)\s+\w+)?\s+(?:electronically\s+)?by")
# To the end of a sentence, where the dot of an initial or a title ends none.
_SENTENCE = r"(?:\b(?:[A-Z]|Drs?|Mrs?|Ms|Prof|M\.D)\.|[^.\n])*"
_FIELD = (r"(?:patient(?:'s)?(?:\s+(?:name|id))?|name|dob|date\s+of\s+birth|birth\s*date|address|"
          r"(?:referring|ordering|attending|requesting|reading)(?:\s+(?:physician|doctor|clinician|provider|"
          r"radiologist))?|radiologist|physician|resident|technologist|sonographer)")

# Each with what it leaves; \1 is a word that tells no identity and keeps the sentence whole.
_TEXTS: tuple[tuple[str, int, str], ...] = (
    (r"\[\*\*.{0,200}?\*\*\]", re.DOTALL, BLANK),
    # Sign-offs to the end of the sentence, fields of a form to that of the line.
    (rf"\b({_SIGNED})\b[ \t:]*{_SENTENCE}", re.IGNORECASE, rf"\1 {BLANK}"),
    (rf"(?m)(^|[\n;|]|[ \t]{{2}})([ \t]*{_FIELD}[ \t]*[:#=])[ \t]*(?!\s)[^\n]*", re.IGNORECASE, rf"\1\2 {BLANK}"),
    # Bounded, and from the beginning of a word on: else a long word costs the square of its length.
    (r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+", 0, BLANK),
    (r"\b(?:https?://|www\.)\S+", re.IGNORECASE, BLANK),
    # UIDs, and other chains of five numbers and more.
    (r"\b\d+(?:\.\d+){4,}\b", 0, BLANK),
    # Dates.
    (r"\b\d{1,2}([/.-])\d{1,2}\1(?:\d{4}|\d{2})\b", 0, BLANK),
    (r"\b(?:19|20)\d\d([/.-])\d{1,2}\1\d{1,2}(?:T[\d:.]+Z?)?\b", 0, BLANK),
    (rf"\b{_DAY}(?:\s+of)?[\s-]+{_MONTH}(?:,?[\s-]*(?:19|20)?\d\d)?(?!\w)", re.IGNORECASE, BLANK),
    (rf"\b{_MONTH}[\s-]+{_DAY}\b(?:,?\s*(?:19|20)\d\d)?", re.IGNORECASE, BLANK),
    (rf"\b{_MONTH},?[\s-]+(?:19|20)\d\d\b", re.IGNORECASE, BLANK),
    # May is a verb, too, unless a year follows, or an ordinal stands beside it.
    (rf"\b(?:{_DAY}(?:\s+of)?[\s-]+)?may(?:[\s-]+{_DAY})?,?[\s-]+(?:19|20)\d\d\b", re.IGNORECASE, BLANK),
    (r"\b(?:\d{1,2}(?:st|nd|rd|th)(?:\s+of)?\s+may|may\s+\d{1,2}(?:st|nd|rd|th))\b", re.IGNORECASE, BLANK),
    (r"\b(on|from|dated|since|of|date)\s+\d{1,2}/\d{1,2}\b(?!/)", re.IGNORECASE, rf"\1 {BLANK}"),
    # Times of day.
    (r"\b\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?(?:\s*(?:[ap]m\b|[ap]\.m\.))?", re.IGNORECASE, BLANK),
    (r"\b\d{1,2}\s*(?:[ap]m\b|[ap]\.m\.)", re.IGNORECASE, BLANK),
    (r"\b\d{4}\s*(?:hours|hrs|h)\b", re.IGNORECASE, BLANK),
    # Numbers of telephones, records and the like.
    (r"\b((?:tel|telephone|phone|pager|beeper|fax|ext|extension)\b[ .:#]*)\+?\d[\d ()./-]*\d", re.IGNORECASE,
     rf"\1{BLANK}"),
    (r"(?<![\w.])\+?(?:\d{1,3}[ .-])?\(?\d{3,4}\)?[ ./-]\d{3,4}[ .-]\d{3,4}\b", 0, BLANK),
    (r"\b\d{3}-\d{4}\b", 0, BLANK),
    (r"\b\d{3}-\d{2}-\d{4}\b", 0, BLANK),
    (r"\b((?:mrn|accession|acc|patient\s+id|record|account|ssn|nhs)\s*(?:number|no\.?|#)?\s*[:#]?\s*)(?=[\w-]*\d{3})[\w-]+",
     re.IGNORECASE, rf"\1{BLANK}"),
    (r"\b[A-Za-z]{0,4}-?\d{6,}[A-Za-z]{0,2}\b", 0, BLANK),
    # Ages of 90 and more: so few that they tell who it is.
    (r"\b(?:9\d|1[01]\d)([ -]?(?:years?|yrs?|y/?o|yo)\b)", re.IGNORECASE, rf"{BLANK}\1"),
    # Names, by what stands before or behind them.
    (rf"\b((?:[Dd]rs?|DRS?|[Pp]rof|PROF|Mrs?|MRS|Ms|M[RS](?=\.)|Miss|MISS|[Dd]octor|DOCTOR|[Pp]rofessor|PROFESSOR|"
     rf"[Nn]urse|NURSE)\b\.?)[ \t]+{_NAMES}", 0, rf"\1 {BLANK}"),
    (rf"\b{_NAMES},?[ \t]+({_DEGREE})(?![\w-])", 0, rf"{BLANK} \1"),
    (rf"\b{_NAMES},[ \t]+(RN|R\.N\.|NP|PA-C|DO|RDMS)(?![\w-])", 0, rf"{BLANK} \1"),
    (rf"\b{_NAMES}[ \t]+(Hospital|Clinic|Infirmary|Medical[ \t]+Cent(?:er|re))\b", 0, rf"{BLANK} \1"),
)
_RULES = tuple((re.compile(pattern, flags), leaves) for pattern, flags, leaves in _TEXTS)


def scrub(text: str, known_values: Iterable[str] = ()) -> str:
    """A report's text without what identifies people, as far as rules can tell; see the module's text.

    Args:
        text: of a report or a section.
        known_values: what the report's record says of people: names as DICOM writes them or in words, numbers. Taken
            out wherever they stand, whole words at a time; of names also each part of 3 letters and more, where it is
            written with a capital letter.
    """
    # No rule needs more, and some would cost the square of what there is.
    text = re.sub(r"(?:[ \t]{0,2}\r?\n){3,}", "\n\n", re.sub(r"[ \t]{3,}", "  ", text))
    for pattern in _known(known_values):
        text = pattern.sub(BLANK, text)
    for pattern, leaves in _RULES:
        text = pattern.sub(leaves, text)
    return re.sub(rf"{BLANK}(?:[ \t]*{BLANK})+", BLANK, text)


def _known(values: Iterable[str]) -> list[re.Pattern[str]]:
    """Longest first, so that a part does not break the whole."""
    patterns: dict[str, re.Pattern[str]] = {}
    for value in values:
        words = [word for word in re.split(r"[\s^=,;]+", value.strip()) if word]
        if len(value.strip()) < 3 or not words:
            continue
        between = r"[\s^=,;.]+"
        # As it stands, turned round, and with the family name, which DICOM has first, last.
        for order in (words, words[::-1], [*words[1:], words[0]]):
            whole = between.join(map(re.escape, order))
            patterns[whole] = re.compile(rf"(?<!\w){whole}(?!\w)", re.IGNORECASE)
        for word in words:
            if len(word) >= 3 and word[0].isalpha():
                forms = "|".join(sorted({re.escape(form) for form in (word, word.upper(), word.title())}))
                patterns.setdefault(forms, re.compile(rf"(?<!\w)(?:{forms})(?!\w)"))
    return [patterns[key] for key in sorted(patterns, key=len, reverse=True)]
