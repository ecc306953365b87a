"""tokenizer.model: InternLM2's kind of tokenizer. Against SentencePiece itself it was compared by hand (docs/hf.md)."""

import json
import struct
from pathlib import Path

import pytest

from megamed.data import load_tokenizer
from megamed.data.sentencepiece import read_sentencepiece
from megamed.utils import UserError

S = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
# Scores are minus the rank of a merge. "ab" and "bc" are both there, and "bc" is the better one.
PIECES = [
    ("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    ("bc", -1.0, NORMAL), ("ab", -2.0, NORMAL), (f"{S}a", -3.0, NORMAL), (f"{S}{S}", -4.0, NORMAL),
    ("cc", -5.0, NORMAL),
    (S, -6.0, NORMAL), ("a", -7.0, NORMAL), ("b", -8.0, NORMAL), ("c", -9.0, NORMAL),
    ("[UNUSED_TOKEN_0]", 0.0, NORMAL), ("[UNUSED_TOKEN_1]", 0.0, NORMAL),
]  # fmt: skip
NUMBER = {text: number for number, (text, _, _) in enumerate(PIECES)}


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def write(path: Path, kind: int = 2, prefix: int = 0, extra: int = 0) -> Path:
    """A model of `PIECES`."""
    data = b"".join(
        message(1, message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, of_kind))
        for text, score, of_kind in PIECES
    )  # fmt: skip
    data += message(2, message(1, b"corpus.txt") + number(3, kind) + number(4, len(PIECES)))
    path.write_bytes(data + message(3, message(1, b"identity") + number(3, prefix) + number(4, extra)))
    return path


def texts(tokens: list[int]) -> list[str]:
    return [PIECES[token][0] for token in tokens]


def test_the_best_scores_are_joined_first(tmp_path: Path) -> None:
    tokenizer = read_sentencepiece(write(tmp_path / "tokenizer.model"), {})
    for text, wanted in {
        "abc": ["a", "bc"],  # not "ab" and "c"
        "ab": ["ab"],
        " ab": [S, "ab"],  # for the same reason
        "  a": [S, f"{S}a"],
        "  b": [f"{S}{S}", "b"],
        "\u00fc": ["<0xC3>", "<0xBC>"],
        "a\n": ["a", "<0x0A>"],
        "": [],
    }.items():
        found = tokenizer.encode(text, add_special_tokens=False).ids
        assert texts(found) == wanted, text
        assert tokenizer.decode(found) == text


def test_a_prefix_is_there_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = read_sentencepiece(write(tmp_path / "tokenizer.model", prefix=1), {})
    found = tokenizer.encode("a b", add_special_tokens=False).ids
    assert texts(found) == [f"{S}a", S, "b"] and tokenizer.decode(found) == "a b"


def test_added_tokens_have_their_numbers(tmp_path: Path) -> None:
    """In the place of unused pieces, as InternLM2 has its turns, and behind the last piece."""
    write(tmp_path / "tokenizer.model")
    unused, last = NUMBER["[UNUSED_TOKEN_1]"], len(PIECES)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": last + 1, "<img>": last}))
    decoder = {str(unused): {"content": "<|im_end|>"}, "1": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "pad_token": "</s>"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.im_end_id, tokenizer.img_start_id, tokenizer.img_context_id) == (unused, last, last + 1)
    assert tokenizer.pad_id == 2
    assert tokenizer.encode("ab") == [NUMBER["ab"]]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).encode("abc  a") == tokenizer.encode("abc  a")


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for change, wanted in (
        (lambda: write(path, kind=1), "is no byte-pair encoding"),
        (lambda: write(path, extra=1), "drops spaces of the text"),
        (lambda: path.write_bytes(write(path).read_bytes()[:50]), "cannot be read as a SentencePiece model"),
        (lambda: path.write_bytes(b""), "it has no pieces"),
    ):
        change()
        with pytest.raises(UserError, match=wanted):
            read_sentencepiece(path, {})
    with pytest.raises(UserError, match="added token <x> has number 999, which is not the next"):
        read_sentencepiece(write(path), {999: "<x>"})


def test_qwen2_without_tokenizer_json(tmp_path: Path) -> None:
    words = ["a", "b", "c", "\u0120", "ab", "\u0120a"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\u0120 a\n")
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    added = {"6": {"content": "<|im_end|>", "special": True}}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("ab a") == [4, 5] and tokenizer.im_end_id == 6
