"""Reads a SentencePiece model (`tokenizer.model`) as a Hugging Face `tokenizers` tokenizer: InternLM2's, Llama's.

The file is a protocol buffer (sentencepiece_model.proto of https://github.com/google/sentencepiece), of which little
is needed. Its byte-pair encoding has no list of merges: of neighbouring pieces those are joined first whose joint piece
has the best score, which is the order of merges that is made here (as transformers does for Llama).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from megamed.utils import UserError

SPACE = "\u2581"
# Types of pieces, and the type of model that is read.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary."""

    text: str
    score: float
    kind: int


def read_sentencepiece(path: Path, added: Mapping[int, str]) -> Tokenizer:
    """The tokenizer of a file.

    Args:
        path: the file.
        added: tokens by number that lie beside it; one whose number the file has takes the place of its piece.

    Raises:
        UserError: the file is damaged, or of a kind that is not read; or the added tokens do not follow its pieces.
    """
    try:
        pieces, kind, rules = _parse(path.read_bytes())
    except (OSError, ValueError, IndexError, LookupError) as error:
        raise UserError(f"{path} cannot be read as a SentencePiece model ({error}); download it again") from error
    if kind != _BPE:
        raise UserError(f"{path} is no byte-pair encoding; save the tokenizer as tokenizer.json with transformers")
    if rules.get("remove_extra_whitespaces", 1):
        raise UserError(f"{path} drops spaces of the text; save the tokenizer as tokenizer.json with transformers")
    pieces = [Piece(added[i], x.score, _USER_DEFINED) if i in added else x for i, x in enumerate(pieces)]
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab, merges=_merges(pieces, vocab), unk_token=unknown, fuse_unk=True,
            byte_fallback=any(piece.kind == _BYTE for piece in pieces),
        )
    )  # fmt: skip
    has_prefix = bool(rules.get("add_dummy_prefix", 1))
    begin = [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    end = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    for number in sorted(number for number in added if number >= len(pieces)):
        tokenizer.add_special_tokens([AddedToken(added[number], normalized=False, special=True)])
        if tokenizer.token_to_id(added[number]) != number:
            raise UserError(
                f"{path.parent}: its added token {added[number]} has number {number}, which is not the next one; "
                "download its files again"
            )
    return tokenizer


def _merges(pieces: list[Piece], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that have a joint piece, in the order of its score; of one, the pair of lower numbers first."""
    found: list[tuple[float, int, int, str, str]] = []
    for piece in pieces:
        if piece.kind == _NORMAL:
            for i in range(1, len(piece.text)):
                left, right = piece.text[:i], piece.text[i:]
                if left in vocab and right in vocab:
                    found.append((-piece.score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _parse(data: bytes) -> tuple[list[Piece], int, dict[str, int]]:
    """Pieces, type of the model, and what becomes of spaces."""
    pieces, kind, rules = [], 1, {}
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif field == 2 and isinstance(value, bytes):
            kind = next((x for f, x in _fields(value) if f == 3 and isinstance(x, int)), 1)
        elif field == 3 and isinstance(value, bytes):
            names = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces"}
            rules = {names[f]: x for f, x in _fields(value) if f in names and isinstance(x, int)}
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces, kind, rules


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            text = value.decode()
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a message: whole numbers, or bytes of whatever else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} is no field")
        if at + size > len(data):
            raise ValueError("it ends in the middle")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
