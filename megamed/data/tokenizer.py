"""A thin wrapper on Hugging Face `tokenizers`, with the special tokens that InternVL uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

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
    """`bytes`, or the tokenizer of a folder with a Hugging Face `tokenizer.json`.

    Special tokens that the folder's tokenizer lacks get the next free ids, so a model's embedding
    has to have `vocab_size` rows.

    Raises:
        UserError: the folder has no `tokenizer.json`, or one that cannot be read.
    """
    if name_or_dir == "bytes":
        return TextTokenizer(_bytes_tokenizer())
    folder = Path(name_or_dir).expanduser()
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"data.tokenizer={name_or_dir!r} has no tokenizer.json; give 'bytes' or the folder of a Hugging "
            "Face fast tokenizer (transformers' save_pretrained writes one)",
            everywhere=True,
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path} cannot be read as a tokenizer ({error}); save it again") from error
    settings = _settings(folder / "tokenizer_config.json")
    pad = settings.get("pad_token") or PAD
    pad_name = pad["content"] if isinstance(pad, dict) else str(pad)
    template = settings.get("chat_template")
    jinja = folder / "chat_template.jinja"  # where newer versions of transformers write it
    if template is None and jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    return TextTokenizer(tokenizer, pad_name, template if isinstance(template, str) else None)


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
