"""Folders that do not fit themselves, kills, full disks: one line each, and nothing half-written under the name."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamed.checkpoint import rewrite
from megamed.checkpoint.hf import bridge, target
from megamed.checkpoint.hf.convert import export_folder, import_folder
from megamed.checkpoint.spans import copy_spans
from megamed.utils import UserError
from tests.checkpoint.hf.folders import release
from tests.small_disk import mounted

MODEL = "model.safetensors"
QKV = "language_model.model.layers.1.attention.wqkv.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    release(folder, "internlm2", torch.bfloat16)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in original.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / MODEL)
        change(tensors)
        save_file(tensors, folder / MODEL)

    return damage


def with_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor is missing": (
        with_tensors(lambda t: t.pop(QKV)),
        f"lacks {QKV}, a part of language.decoder.layers.1.self_attention.linear_qkv.weight: check that all its files",
    ),
    "a tensor too many": (
        with_tensors(lambda t: t.update({"language_model.model.layers.2.ffn_norm.weight": torch.zeros(64)})),
        "has language_model.model.layers.2.ffn_norm.weight, which a model of its config.json has no place for",
    ),
    "rows": (with_tensors(lambda t: t.update({QKV: t[QKV][:-1].clone()})), f"{QKV} has 127 rows.*128 by the model"),
    "columns": (
        with_tensors(lambda t: t.update({QKV: t[QKV][:, 1:].clone()})),
        rf"{QKV} has the shape \(128, 63\), and \(128, 64\) follows from config.json",
    ),
    "another vocabulary": (
        with_config(lambda c: c["llm_config"].update(vocab_size=251)),
        "tok_embeddings.weight has 250 rows in the checkpoint, 251 by the model: check vocab_size",
    ),
    "tied, and different": (
        with_config(lambda c: c["llm_config"].update(tie_word_embeddings=True)),
        "says that language_model.output.weight is tied to language_model.model.tok_embeddings.weight, and they differ",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "hf: has no config.json that can be read"),
    "a damaged configuration": (lambda f: (f / "config.json").write_text("{"), "hf/config.json: is damaged"),
    "an unknown architecture": (
        with_config(lambda c: c.update(architectures=["LlavaForConditionalGeneration"], model_type="llava")),
        "hf/config.json: is of LlavaForConditionalGeneration, an unknown architecture; known are InternVL",
    ),
    "an unknown language model": (
        with_config(lambda c: c["llm_config"].update(architectures=["GPT2LMHeadModel"], model_type="gpt2")),
        "its language model is GPT2LMHeadModel; there are internlm2, llama,",
    ),
    "a quantised model": (
        with_config(lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})),
        r"the model is quantised \(bitsandbytes\), and rounding cannot be taken back; download the release in bf16",
    ),
    "a size is missing": (
        with_config(lambda c: c["llm_config"].pop("hidden_size")), "llm_config.hidden_size is missing, and decides",
    ),
    "an activation": (
        with_config(lambda c: c["llm_config"].update(hidden_act="gelu")), "llm_config.hidden_act is gelu; only SwiGLU",
    ),
    "a rotation": (
        with_config(lambda c: c["llm_config"].update(rope_scaling={"type": "longrope", "factor": 2.0})),
        "llm_config.rope_scaling is of type longrope, which cannot be built",
    ),
    "biases": (with_config(lambda c: c["llm_config"].update(bias=True)), "llm_config.bias is True; attention with"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_what_does_not_fit_is_named(what: str, folder: Path, tmp_path: Path) -> None:
    damage, message = FAULTS[what]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        import_folder(folder, tmp_path / "new", {})
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@contextlib.contextmanager
def watched(owner: type, method: str, names: list[str], dies_at: str | None) -> Iterator[None]:
    """Note the names that a method is called with; end the program at one of them, with no chance to clean up more than
    after a kill: nothing that was written is removed then."""
    original = getattr(owner, method)

    def watch(self: Any, name: str, *others: Any) -> Any:
        if name == dies_at:
            raise KeyboardInterrupt
        names.append(name)
        return original(self, name, *others)

    setattr(owner, method, watch)
    try:
        yield
    finally:
        setattr(owner, method, original)


def test_after_a_stop_both_ways_go_on(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_FILE_BYTES", 2**15)  # about two parameters
    new, back = tmp_path / "new", tmp_path / "back"
    with watched(bridge.Incoming, "spans", [], "vision.projector.fc1.weight"), pytest.raises(KeyboardInterrupt):
        import_folder(original, new, {})
    assert not new.exists()
    read: list[str] = []
    with watched(bridge.Incoming, "spans", read, None):
        import_folder(original, new, {})
    assert 0 < len(read) < 40 and "language.embedding.word_embeddings.weight" not in read
    copies = iter(range(100))

    def dies_at_the_tenth(*arguments: Any) -> None:
        if next(copies) == 10:
            raise KeyboardInterrupt
        copy_spans(*arguments)

    monkeypatch.setattr(target, "copy_spans", dies_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        export_folder(new, back)
    assert not back.exists()
    with open(tmp_path / "back.unfinished" / MODEL, "ab") as file:
        file.write(b"half of a tensor")
    export_folder(new, back)
    num_tensors = len(load_file(original / MODEL))
    assert next(copies) == 11 + num_tensors - 10, "what was written before is kept"
    assert (back / MODEL).read_bytes() == (original / MODEL).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "new"]


def test_a_full_disk_is_named_and_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_folder(original, tmp_path / "new", {})
    with mounted(tmp_path / "disk", "256k") as disk:
        with pytest.raises(UserError, match=r"--to .*new: takes \d MiB, and 0 MiB are free there; free space"):
            import_folder(original, disk / "new", {})
        monkeypatch.setattr("megamed.checkpoint.aside._need_space", lambda target, num_bytes: None)
        for action, source in ((lambda a, b: import_folder(a, b, {}), original), (export_folder, tmp_path / "new")):
            with pytest.raises(UserError, match=r"--to .*x: cannot be written \(.* MiB free there\); free space"):
                action(source, disk / "x")
            assert not list(disk.iterdir())


def test_a_type_that_training_changed_is_named_or_converted(original: Path, tmp_path: Path) -> None:
    import_folder(original, tmp_path / "new", {})
    export_folder(tmp_path / "new", tmp_path / "fp32", "fp32")
    tensors = load_file(tmp_path / "fp32" / MODEL)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    was = load_file(original / MODEL)
    assert tensors.keys() == was.keys() and all(torch.equal(tensors[name], was[name].float()) for name in was)
    config = json.loads((tmp_path / "fp32" / "config.json").read_text())
    assert config["torch_dtype"] == config["vision_config"]["torch_dtype"] == "float32"
    assert (tmp_path / "fp32" / "modeling.py").read_bytes() == (original / "modeling.py").read_bytes()


def test_files_are_laid_out_as_transformers_does() -> None:
    plan, index = target.plan_files({"b": ((2, 3), torch.float32), "a": ((4,), torch.bfloat16)})
    assert list(plan) == [MODEL] and index is None
    assert [entry.name for entry in plan[MODEL].entries] == ["b", "a"], "larger types first"
    plan, index = target.plan_files({name: ((10,), torch.float32) for name in "abc"}, shard_bytes=80)
    assert list(plan) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index is not None
    assert json.loads(index)["metadata"] == {"total_parameters": 30, "total_size": 120}
    assert json.loads(index)["weight_map"]["c"] == "model-00002-of-00002.safetensors"
