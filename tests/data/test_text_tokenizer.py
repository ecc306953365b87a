"""Text and ids: the byte tokenizer, a user's own, and what `transformers` makes of the saved one."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megamed.data import load_tokenizer
from megamed.utils import UserError

SPECIALS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
TEXT = "Größe 4.0 x 4.0 mm\n  µ→ 中"


def special_ids(tokenizer) -> list[int]:
    return [
        tokenizer.im_start_id,
        tokenizer.im_end_id,
        tokenizer.img_start_id,
        tokenizer.img_end_id,
        tokenizer.img_context_id,
    ]


@pytest.fixture
def user_folder(tmp_path):
    """A small byte-level BPE of someone's own, which knows two of the special tokens and its padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>", "<img>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the volumes of the run"] * 4, trainer)
    tokenizer.enable_padding(length=32)
    folder = tmp_path / "own"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_bytes_are_their_values():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size == 262
    assert sorted([tokenizer.pad_id, *special_ids(tokenizer)]) == list(range(256, 262))


def test_special_tokens_in_text_are_text():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("<|im_end|><img>") == list(b"<|im_end|><img>")
    assert tokenizer.decode([*b"up", tokenizer.im_end_id]) == "up"


@pytest.mark.parametrize("which", ["bytes", "own"])
def test_saved_tokenizer_loads_in_transformers(tmp_path, user_folder, which):
    tokenizer = load_tokenizer("bytes" if which == "bytes" else str(user_folder))
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert (again.vocab_size, again.pad_id, special_ids(again)) == (
        tokenizer.vocab_size,
        tokenizer.pad_id,
        special_ids(tokenizer),
    )
    for loader in (PreTrainedTokenizerFast, AutoTokenizer):
        theirs = loader.from_pretrained(tmp_path / "saved")
        assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
        assert theirs("".join(SPECIALS)).input_ids == special_ids(tokenizer)
        assert theirs.pad_token_id == tokenizer.pad_id and theirs.eos_token_id == tokenizer.im_end_id
        assert len(theirs) == tokenizer.vocab_size
        # The names that transformers' InternVL processor uses.
        assert theirs.start_image_token_id == tokenizer.img_start_id
        assert theirs.context_image_token_id == tokenizer.img_context_id


def test_chat_template_writes_the_turns_of_a_document(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "TR?"}, {"role": "assistant", "content": "2.0 s"}]
    text = theirs.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\nTR?<|im_end|>\n<|im_start|>assistant\n2.0 s<|im_end|>\n"


def test_own_tokenizer_keeps_its_ids_and_gains_what_it_lacks(user_folder):
    before = Tokenizer.from_file(str(user_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(user_folder))
    assert tokenizer.pad_id == before.token_to_id("<|endoftext|>")
    assert tokenizer.im_end_id == before.token_to_id("<|im_end|>")
    assert tokenizer.img_start_id == before.token_to_id("<img>")
    size = before.get_vocab_size()
    added = [tokenizer.im_start_id, tokenizer.img_end_id, tokenizer.img_context_id]
    assert sorted(added) == [size, size + 1, size + 2] and tokenizer.vocab_size == size + 3
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode("the volumes")) < len("the volumes")  # its merges, and no padding


def test_own_chat_template_is_kept(tmp_path, user_folder):
    def saved_template() -> str:
        load_tokenizer(str(user_folder)).save(tmp_path / "saved")
        return json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["chat_template"]

    assert saved_template() == "{{ messages }}"
    (user_folder / "tokenizer_config.json").write_text("{}")
    (user_folder / "chat_template.jinja").write_text("{{ 'file' }}")
    assert saved_template() == "{{ 'file' }}"


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        load_tokenizer(str(tmp_path))
    load_tokenizer("bytes").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_tokenizer(str(tmp_path))
