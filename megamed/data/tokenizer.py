"""A thin wrapper on Hugging Face `tokenizers`, with the special tokens that InternVL uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from megamed.data.sentencepiece import read_sentencepiece
from megamed.utils import UserError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
PAD = "<pad>"

# ChatML, the turns that InternVL and Qwen are trained with.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TextTokenizer:
    """Text to token ids and back.

    Args:
        tokenizer: the Hugging Face tokenizer; special tokens that it lacks are added to it.
        pad: its padding token.
        chat_template: Jinja text that `save` writes; ChatML where None.

    Attributes:
        vocab_size: highest token id + 1.
        pad_id, im_start_id, im_end_id, img_start_id, img_end_id, img_context_id: ids of `<pad>`,
            `<|im_start|>`, `<|im_end|>`, `<img>`, `</img>`, `<IMG_CONTEXT>`.
    """

    def __init__(self, tokenizer: Tokenizer, pad: str = PAD, chat_template: str | None = None):
        names = (pad, IM_START, IM_END, IMG_START, IMG_END, IMG_CONTEXT)
        # `normalized=False` keeps a normaliser (lower-casing, say) from ever changing them. A token that is
        # there already keeps its id.
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
        # A report that happens to contain "<|im_end|>" must not end a turn: `encode` reads text as text.
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._pad = pad
        self._chat_template = chat_template or _CHAT_TEMPLATE
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.pad_id = vocab[pad]
        self.im_start_id, self.im_end_id = vocab[IM_START], vocab[IM_END]
        self.img_start_id, self.img_end_id = vocab[IMG_START], vocab[IMG_END]
        self.img_context_id = vocab[IMG_CONTEXT]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token is added, and none is recognised in it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without the special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def digest(self) -> str:
        """A sum over all that decides which ids a text has."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers` loads."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(place / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self._pad,
            "eos_token": IM_END,
            "clean_up_tokenization_spaces": False,
            # The names under which transformers' InternVL processor asks for them.
            "extra_special_tokens": {
                "start_image_token": IMG_START,
                "end_image_token": IMG_END,
                "context_image_token": IMG_CONTEXT,
            },
            "chat_template": self._chat_template,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (place / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def load_tokenizer(name_or_dir: str) -> TextTokenizer:
    """`bytes`, or the tokenizer of a Hugging Face folder.

    That is its `tokenizer.json`; of releases that have none, `tokenizer.model` (SentencePiece: InternLM2), or
    `vocab.json` with `merges.txt` (Qwen2), with the added tokens that lie beside them. Special tokens that it lacks get
    the next free ids, so a model's embedding has to have `vocab_size` rows.

    Raises:
        UserError: the folder has no tokenizer, or one that cannot be read.
    """
    if name_or_dir == "bytes":
        return TextTokenizer(_bytes_tokenizer())
    folder = Path(name_or_dir).expanduser()
    settings = _settings(folder / "tokenizer_config.json")
    tokenizer = _open(folder, settings)
    if tokenizer is None:
        raise UserError(
            f"data.tokenizer={name_or_dir!r} has no tokenizer.json (nor tokenizer.model, nor Qwen2's vocab.json and "
            "merges.txt); give 'bytes' or the folder of a Hugging Face tokenizer (transformers' save_pretrained writes "
            "one)",
            everywhere=True,
        )
    pad = settings.get("pad_token") or PAD
    pad_name = pad["content"] if isinstance(pad, dict) else str(pad)
    template = settings.get("chat_template")
    jinja = folder / "chat_template.jinja"  # where newer versions of transformers write it
    if template is None and jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    return TextTokenizer(tokenizer, pad_name, template if isinstance(template, str) else None)


def has_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds one in a folder."""
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _open(folder: Path, settings: dict[str, Any]) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        path = folder / "tokenizer.model"
        if path.is_file():
            return read_sentencepiece(path, _added(folder, settings))
        path = folder / "vocab.json"
        if has_tokenizer(folder) and "Qwen2" in str(settings.get("tokenizer_class")):
            from transformers import Qwen2Tokenizer

            return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path} cannot be read as a tokenizer ({error}); save it again") from error
    return None


def _added(folder: Path, settings: dict[str, Any]) -> dict[int, str]:
    """Added tokens by number, of the two files in which they may be."""
    by_name = _settings(folder / "added_tokens.json")
    by_number = settings.get("added_tokens_decoder") or {}
    return {int(number): text for text, number in by_name.items()} | {
        int(number): token["content"] for number, token in by_number.items()
    }


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); save the tokenizer again") from error
    return settings if isinstance(settings, dict) else {}


def _bytes_tokenizer() -> Tokenizer:
    """256 bytes whose ids are their values: byte-level BPE without merges."""
    vocab = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2).

    Bytes that print in Latin-1 stand for themselves; the others take the code points from 256 on.
    """
    printing = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}
