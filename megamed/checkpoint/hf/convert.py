"""Whole models from Hugging Face folders to checkpoints, and back: in one process, without a GPU, in bounded memory."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamed.checkpoint.card import CARD, describe_model, differing_key, model_of
from megamed.checkpoint.hf.bridge import Incoming, Outgoing
from megamed.checkpoint.hf.names import name_of, stored
from megamed.checkpoint.hf.sidecar import (
    SIDECAR,
    copy_sidecar,
    find_sidecar,
    kept_headers,
    kept_left_out,
    restore_sidecar,
)
from megamed.checkpoint.hf.source import DTYPES as STORED_TYPES
from megamed.checkpoint.hf.source import INDEX, NAMES, Source
from megamed.checkpoint.hf.target import Plan, plan_files, write_safetensors
from megamed.checkpoint.rewrite import Piece, make_card, one_process, outline, write_weights
from megamed.checkpoint.spans import Span
from megamed.checkpoint.weights import Weights
from megamed.config import to_yaml
from megamed.data import load_tokenizer
from megamed.data.tokenizer import has_tokenizer
from megamed.models.families import INTERNVL, Family, family_of
from megamed.models.families.internvl.config import write_config
from megamed.models.language.hf import Family as Decoder
from megamed.models.vlm import VLMConfig
from megamed.models.weight_map import Table
from megamed.utils import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How config.json calls types, and the keys it has them under.
_TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_TYPE_KEYS = ("dtype", "torch_dtype")
MODEL_FILE = "model.yaml"
_IMAGE_TOKEN = "<IMG_CONTEXT>"


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder that is understood.

    Attributes:
        path: of it.
        source: its tensors.
        config: its config.json.
        family: whose it is.
        model: its sizes, as ours.
        table: its names and ours.
    """

    path: Path
    source: Source
    config: dict[str, Any]
    family: Family
    model: VLMConfig
    table: Table

    @property
    def incoming(self) -> Incoming:
        """Its tensors as our parameters."""
        return Incoming(self.source, self.table)


def open_folder(path: Path) -> Folder:
    """Understand a Hugging Face folder.

    Raises:
        UserError: a file is missing or damaged, or the model is none that can be built.
    """
    config = read_config_file(path)
    try:
        family = family_of(config)
        source = Source(path)
        model, decoder = family.read_config(config, source.names), family.decoder_of(config)
    except UserError as error:
        raise UserError(str(error).replace("config.json", str(path / "config.json"), 1)) from error
    return Folder(path, source, config, family, model, family.table(model, decoder, source.names))


def read_config_file(path: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: has no config.json that can be read ({error.strerror}); name the folder of a Hugging Face model"
        ) from error
    except ValueError as error:
        raise UserError(f"{file}: is damaged ({error}); download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: is no JSON object; download it again")
    return config


def import_folder(path: Path, target: Path, versions: dict[str, str]) -> tuple[VLMConfig, int]:
    """Make a checkpoint of a Hugging Face folder, and keep what else is in it beside.

    Args:
        path: the folder.
        target: the checkpoint, which is there when it is complete. A killed import goes on where it was.
        versions: of what makes it, for its card.

    Returns:
        The model, and bytes of weights.

    Raises:
        UserError: the folder is damaged or not understood, or the target cannot be written.
    """
    folder = open_folder(path)
    incoming = folder.incoming
    with one_process() as mesh:
        found = outline(folder.model, mesh, torch.float32)
        pieces = [piece for piece in found if isinstance(piece, Piece)]
        others = [key for key in found if isinstance(key, str)]
        shapes = {name_of(p.name, p.stack): p.whole[len(p.stack) :] for p in pieces}
        incoming.check(shapes)

        def make(key: str, stack: tuple[int, ...]) -> Tensor:
            name = name_of(key, stack)
            out = torch.empty(shapes[name], dtype=incoming.dtype(name))
            incoming.fill(name, len(out), (0,) * out.dim(), out)
            return out

        def find(piece: Piece) -> list[Span] | None:
            stacked = len(piece.stack)
            shape, sizes = piece.whole[stacked:], piece.sizes[stacked:]
            if not shape or sizes[1:] != shape[1:]:
                return None
            first = piece.offsets[stacked]
            return incoming.spans(name_of(piece.name, piece.stack), shape[0], first, first + sizes[0])

        num_bytes = write_weights(
            target,
            [*(replace(p, dtype=incoming.dtype(name_of(p.name, p.stack))) for p in pieces), *others],
            make,
            make_card(folder.model, versions),
            {MODEL_FILE: to_yaml(folder.model)},
            identity=folder.source.fingerprint,
            prepare=lambda aside: keep_sidecar(folder, aside / SIDECAR),
            num_threads=2,  # two of the largest tensors are in memory at most, where they have to be made
            find=find,
        )
    return folder.model, num_bytes


def keep_sidecar(folder: Folder, to: Path) -> None:
    """Copy what is not one of our parameters."""
    left_out = {name: folder.source.read(name) for name in folder.source.names if folder.table.is_left_out(name)}
    copy_sidecar(folder.source, to, left_out)


@dataclass(frozen=True)
class Export:
    """What an export writes.

    Attributes:
        outgoing: makes the tensors.
        plan: of files of weights.
        types: type of each tensor in them.
        left_out: tensors that are none of our parameters.
        sidecar: where the other files are.
        files: that are written anew, by name.
        dropped: names of files of the sidecar that do not fit the model any more.
        tokenizer: folder of one, for a model without a sidecar.
    """

    outgoing: Outgoing
    plan: Plan
    types: dict[str, torch.dtype]
    left_out: dict[str, Tensor]
    sidecar: Path | None
    files: dict[str, str]
    dropped: tuple[str, ...] = ()
    tokenizer: Path | None = None

    def make(self, name: str) -> Tensor:
        """A tensor of the files."""
        return self.left_out[name] if name in self.left_out else self.outgoing.make(name).to(self.types[name])

    def find(self, name: str) -> list[Span] | None:
        """Where the bytes of a tensor are in the checkpoint; None if it has to be made."""
        if name in self.left_out or self.types[name] != self.outgoing.dtype(name):
            return None
        return self.outgoing.spans(name)

    def write_beside(self, folder: Path) -> None:
        """Write everything but the weights."""
        if self.sidecar is not None:
            restore_sidecar(self.sidecar, folder)
        if self.tokenizer is not None:
            shutil.copytree(self.tokenizer, folder, dirs_exist_ok=True)
        for name in self.dropped:
            (folder / name).unlink(missing_ok=True)
        for name, text in self.files.items():
            (folder / name).write_text(text)


def export_folder(checkpoint: Path, target: Path, dtype: str | None = None) -> int:
    """Make a Hugging Face folder of a checkpoint.

    A model that came from one gets its files back: the same names, and the same bytes but for what training changed.
    Another, or one that has other layers now, gets the format of transformers.

    Args:
        checkpoint: its folder.
        target: the folder, which is there when it is complete. A killed export goes on where it was.
        dtype: of `DTYPES`; None for the types of the folder that the model came from, else of the checkpoint.

    Returns:
        Bytes of weights.

    Raises:
        UserError: transformers has no such model, the checkpoint is damaged, or the target cannot be written.
    """
    export = plan_export(checkpoint, dtype)
    status = (checkpoint / CARD).stat()
    identity = f"{checkpoint.resolve()} {status.st_mtime_ns} {dtype}"
    return write_safetensors(target, export.plan, export.make, identity, export.write_beside, export.find)


def plan_export(checkpoint: Path, dtype: str | None) -> Export:
    """See `export_folder`; nothing is written."""
    model, weights, sidecar = model_of(checkpoint), Weights(checkpoint), find_sidecar(checkpoint)
    parameters = dict(stored(weights))
    if sidecar is not None:
        config = read_config_file(sidecar)
        headers = kept_headers(sidecar)
        names = tuple(entry.name for header in headers.values() for entry in header.entries)
        family = family_of(config)
        if differing_key(describe_model(family.read_config(config, names)), describe_model(model)) is None:
            table = family.table(model, family.decoder_of(config), names)
            outgoing = Outgoing(weights, table, parameters)
            return _as_it_came(outgoing, sidecar, config, headers, dtype)
    return _as_transformers(Outgoing(weights, _table(model), parameters), model, sidecar, checkpoint, dtype)


def _as_it_came(
    outgoing: Outgoing, sidecar: Path, config: dict[str, Any], headers: Plan, dtype: str | None
) -> Export:
    left_out = kept_left_out(sidecar)
    shapes = outgoing.shapes()
    for name, other in outgoing.table.repeats.items():
        shapes[name] = shapes[other]
    given = {entry.name: STORED_TYPES[entry.dtype] for header in headers.values() for entry in header.entries}
    if headers and (dtype is None or all(DTYPES[dtype] == given[name] for name in given if name not in left_out)):
        return Export(outgoing, headers, given, left_out, sidecar, {})
    names = list(given) or [name for name in shapes if name not in outgoing.table.repeats]
    planned = {
        name: (tuple(left_out[name].shape), left_out[name].dtype)
        if name in left_out
        else (shapes[name][0], DTYPES[dtype] if dtype else shapes[name][1])
        for name in names
    }
    plan, index = plan_files(planned)
    files = {} if index is None else {INDEX: index}
    if dtype is not None:
        files["config.json"] = json.dumps(_with_type(config, DTYPES[dtype]), indent=2) + "\n"
    types = {name: of_type for name, (_, of_type) in planned.items()}
    return Export(outgoing, plan, types, left_out, sidecar, files, (INDEX, "pytorch_model.bin.index.json"))


def _as_transformers(
    outgoing: Outgoing, model: VLMConfig, sidecar: Path | None, checkpoint: Path, dtype: str | None
) -> Export:
    shapes = outgoing.shapes()
    of_type = DTYPES[dtype] if dtype else next(iter(shapes.values()))[1]
    planned = {name: (shape, of_type) for name, (shape, _) in shapes.items()}
    plan, index = plan_files(planned)
    tokenizer, image_token = _image_token(sidecar, checkpoint)
    config = write_config(model, image_token, _TYPE_NAMES[of_type])
    files = {"config.json": json.dumps(config, indent=2) + "\n", **({INDEX: index} if index else {})}
    code = () if sidecar is None else tuple(path.name for path in sidecar.glob("*.py"))
    types = dict.fromkeys(planned, of_type)
    return Export(outgoing, plan, types, {}, sidecar, files, (INDEX, *code), None if sidecar else tokenizer)


def _table(model: VLMConfig) -> Table:
    """Of transformers' format.

    Raises:
        UserError: it has no such model.
    """
    decoder: Decoder = write_config(model, 0, "float32")["text_config"]["model_type"]
    return INTERNVL.table(model, decoder, ())


def _with_type(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with another type of weights, wherever it says one."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _TYPE_KEYS and isinstance(value, str):
            value = _TYPE_NAMES[dtype]
        found[key] = _with_type(value, dtype) if isinstance(value, dict) else value
    return found


def _image_token(sidecar: Path | None, checkpoint: Path) -> tuple[Path, int]:
    """Folder of the model's tokenizer, and in it the number of the token that stands for a visual one.

    Raises:
        UserError: no tokenizer is beside the model.
    """
    for place in _tokenizers(sidecar, checkpoint):
        if has_tokenizer(place) and not (place / "tokenizer.json").is_file():
            return place, load_tokenizer(str(place)).img_context_id
        try:
            added = json.loads((place / "tokenizer.json").read_text())["added_tokens"]
            return place, next(int(token["id"]) for token in added if token["content"] == _IMAGE_TOKEN)
        except (OSError, ValueError, LookupError, StopIteration):
            continue
    raise UserError(
        f"{checkpoint}: no tokenizer with {_IMAGE_TOKEN} is beside it (in hf/, or in tokenizer/ of its run); copy "
        "the model's tokenizer to one of them"
    )


def _tokenizers(sidecar: Path | None, checkpoint: Path) -> Iterator[Path]:
    if sidecar is not None:
        yield sidecar
    yield checkpoint / "tokenizer"
    yield checkpoint.parent.parent / "tokenizer"


def type_names(checkpoint: Path) -> str:
    """The types in which a checkpoint has its weights, for people."""
    weights = Weights(checkpoint)
    return ", ".join(sorted({NAMES[weights.dtype(name)] for name in weights}))
