"""Lines of any convention become the same sample; what cannot be one is refused with line, key and mend."""

import json

import pytest

from megamed.data.samples import FrameChoice, Message, Sample, StudyRef, parse
from megamed.utils import UserError

U, A = Message("user", "<image>\nAny bleeding?"), Message("assistant", "No.")
SYSTEM = Message("system", "You read images.")
SHOWN = Sample((U, A), images=("a.png",))


@pytest.mark.parametrize(("row", "expected"), [
    ({"messages": [{"role": "user", "content": U.content}, {"role": "assistant", "content": "No."}],
      "images": ["a.png"], "id": 7}, SHOWN),
    ({"conversations": [{"from": "human", "value": U.content}, {"from": "gpt", "value": "No."}], "image": "a.png"},
     SHOWN),
    ({"conversation": [{"human": U.content, "assistant": "No."}], "images": [{"path": "a.png", "bytes": None}]}, SHOWN),
    ({"query": U.content, "response": "No.", "history": [], "image": ["a.png"]}, SHOWN),
    ({"instruction": "<image>", "input": "Any bleeding?", "output": "No.", "images": "a.png"}, SHOWN),
    ({"system": "You read images.", "query": "And now?", "response": "Yes.", "history": [[U.content, "No."]],
      "images": ["a.png"]},
     Sample((SYSTEM, U, A, Message("user", "And now?"), Message("assistant", "Yes.")), images=("a.png",))),
    ({"messages": [{"role": "system", "content": SYSTEM.content}, {"role": "user", "content": "?"},
                   {"role": "assistant", "content": "x", "loss": False}, {"role": "tool_response", "content": "1"},
                   {"role": "assistant", "content": "y"}]},
     Sample((SYSTEM, Message("user", "?"), Message("assistant", "x", False), Message("tool", "1"),
             Message("assistant", "y")))),
    ({"messages": [{"role": "assistant", "content": "Text of a book."}]},
     Sample((Message("assistant", "Text of a book."),))),
    ({"query": "<video><video>?", "response": "x", "videos": ["a.mp4", ["1.png", "2.png"]], "rejected_response": "y",
      "label": True, "objects": {"ref": []}},
     Sample((Message("user", "<video><video>?"), Message("assistant", "x")), videos=("a.mp4", ("1.png", "2.png")),
            rejected_response="y", label=True, objects={"ref": []})),
    ({"query": "?", "response": "x", "studies": ["ab12", {
        "series": "cd34", "windows": ["brain", [75, 215], "bone"],
        "frames": {"range_mm": [0, 90.5], "range_s": None, "every": 2, "at_most": 64}},
        {"series": "e", "windows": "lung"}]},
     Sample((Message("user", "?"), Message("assistant", "x")), studies=(
         StudyRef("ab12"), StudyRef("cd34", ("brain", (75.0, 215.0), "bone"), FrameChoice((0.0, 90.5), None, 2, 64)),
         StudyRef("e", ("lung",))))),
])
def test_conventions(row, expected):
    assert parse(json.dumps(row)) == expected
    assert parse(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r", 3).line == 3


def talk(*turns, **keys):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **keys}


GOOD = (("user", "SECRET"), ("assistant", "SECRET"))


@pytest.mark.parametrize(("row", "says"), [
    ("{", "is no JSON"), ("[" * 100_000, "is no JSON"), ("[1]", "is no JSON object"), ({}, "messages: there are none"),
    ({"messages": []}, "messages: there are none"), ({"messages": "SECRET"}, "messages: is no list"),
    ({"messages": ["SECRET"]}, "messages[0]: is no object"),
    ({"messages": [{"text": "SECRET"}]}, "messages[0]: has no role"),
    (talk(("SECRET", "x")), "messages[0].role: is not known"),
    (talk(("assistant", "x"), ("user", "y"), ("assistant", "z")), "messages[0].role: is assistant at the beginning"),
    (talk(("user", "x"), ("user", "y")), "messages[1].role: is user after user; there comes assistant"),
    (talk(("user", "x"), ("system", "y")), "messages[1].role: is system after user"),
    (talk(("user", None), ("assistant", "x")), "messages[0].content: is no text"),
    (talk(("user", "\ud83d"), ("assistant", "x")), "messages[0].content: is no text"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "loss": 0.5}]},
     "messages[1].loss: is neither true nor false"),
    ({"query": "x", "response": "y", "history": [["SECRET"]]}, "history[0]: is no pair"),
    (talk(*GOOD, images=[{"bytes": "SECRET"}]), "images[0]: has no path"),
    (talk(*GOOD, images=["https://SECRET"]), "images[0]: is no path but an address"),
    (talk(*GOOD, images=[" "]), "images[0]: is no path"),
    (talk(*GOOD, videos=[["a.png", 3]]), "videos[0][1]: is no path"),
    (talk(*GOOD, audios=["SECRET"]), "audios: is not known here"),
    (talk(*GOOD, tools="[]"), "tools: is not known here"),
    (talk(("user", "<image><image>"), ("assistant", "x"), images=["a"]),
     "images: has 1 entries and the messages 2 <image>"),
    (talk(("user", "<image>"), ("assistant", "x"), images=["a", "b"]), "put a <image> for each, or none"),
    (talk(("user", "<study>"), ("assistant", "x")), "studies: has 0 entries and the messages 1 <study>"),
    (talk(*GOOD, studies={"series": "SECRET"}), "studies: is no list"),
    (talk(*GOOD, studies=[{}]), "studies[0]: names no series"),
    (talk(*GOOD, studies=[{"series": "a", "window": "lung"}]),
     "studies[0]: has a key that is not known; did you mean windows?"),
    (talk(*GOOD, studies=[{"series": "a", "windows": ["lung", "bone"]}]), "studies[0].windows: are not 1 or 3"),
    (talk(*GOOD, studies=[{"series": "a", "windows": [[40, 0]]}]), "studies[0].windows[0]: is no window"),
    (talk(*GOOD, studies=[{"series": "a", "windows": [[40, float("nan")]]}]), "studies[0].windows[0]: is no window"),
    (talk(*GOOD, studies=[{"series": "a", "frames": {"range_mm": [9, 3]}}]), "studies[0].frames.range_mm: is no range"),
    (talk(*GOOD, studies=[{"series": "a", "frames": {"every": 0}}]), "studies[0].frames.every: is no count"),
    (talk(*GOOD, studies=[{"series": "a", "frames": {"at_most": 2.5}}]), "studies[0].frames.at_most: is no count"),
    (talk(*GOOD, rejected_response=["SECRET"]), "rejected_response: is no text"),
    (talk(*GOOD, objects=["SECRET"]), "objects: is no object"),
])
def test_faults_are_named_without_a_word_of_the_line(row, says):
    line = row if isinstance(row, str) else json.dumps(row)
    with pytest.raises(UserError) as caught:
        parse(line, 12, "train.jsonl")
    assert str(caught.value).startswith("train.jsonl:12: ") and says in str(caught.value)
    assert "; " in str(caught.value) and "SECRET" not in str(caught.value)
