"""What lies beside a model's weights in a Hugging Face folder, and goes with the model unchanged.

Configurations, tokenizer, preprocessor, chat template, code and licence are kept byte by byte in a folder `hf` of the
checkpoint, with the headers of the weights' files, so that an export gives back the same files.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from megamed.checkpoint.hf.source import Header, Source, parse_header
from megamed.checkpoint.writer import write_file

SIDECAR = "hf"
_HEADERS, _LEFT_OUT = "weights.json", "left_out.safetensors"
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".distcp", ".npz", ".ot",
)  # fmt: skip
# Downloads and version control; files under way.
_NOT_OF_THE_MODEL = (".git", ".cache", "__pycache__", ".huggingface")
_PART = (".incomplete", ".lock")


def copy_sidecar(source: Source, to: Path, left_out: Mapping[str, Tensor]) -> None:
    """Keep everything of a folder but its weights.

    Args:
        source: the folder.
        to: where; replaced if it is there.
        left_out: tensors that are no weights.
    """
    if to.exists():
        shutil.rmtree(to)
    for path in sidecar_files(source.folder):
        copy = to / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / path, copy)
    to.mkdir(parents=True, exist_ok=True)
    headers = {name: header.text for name, header in source.headers.items()}
    write_file(to / _HEADERS, json.dumps(headers).encode())
    if left_out:
        save_file(dict(left_out), to / _LEFT_OUT)


def restore_sidecar(sidecar: Path, to: Path) -> None:
    """Give the files back, byte by byte."""
    for path in sidecar_files(sidecar):
        if path != Path(_HEADERS):
            copy = to / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sidecar / path, copy)


def kept_headers(sidecar: Path) -> dict[str, Header]:
    """Headers of the weights' files, by name; none for a model that came as pickles.

    Raises:
        UserError: they are damaged.
    """
    path = sidecar / _HEADERS
    return {name: parse_header(text, str(path)) for name, text in json.loads(path.read_text()).items()}


def find_sidecar(checkpoint: Path) -> Path | None:
    """What a model's Hugging Face folder had beside weights: in the checkpoint, or in the folder of its run."""
    for place in (checkpoint / SIDECAR, checkpoint.parent.parent / SIDECAR):
        if (place / _HEADERS).is_file():  # or it is some other folder of that name
            return place
    return None


def carry_sidecar(checkpoint: Path, to: Path) -> None:
    """Copy it from a checkpoint, if it has one, into the folder of another that is made of it."""
    sidecar = find_sidecar(checkpoint)
    if sidecar is not None and sidecar.resolve() != (to / SIDECAR).resolve():
        shutil.copytree(sidecar, to / SIDECAR, dirs_exist_ok=True)


def kept_left_out(sidecar: Path) -> dict[str, Tensor]:
    """Tensors that are no weights."""
    path = sidecar / _LEFT_OUT
    return load_file(path) if path.is_file() else {}


def sidecar_files(folder: Path) -> Iterator[Path]:
    """Files that go with a model, relative to its folder; links of a download cache are followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in _NOT_OF_THE_MODEL)
        for name in sorted(names):
            if not name.endswith((*_WEIGHTS, *_PART)):
                yield (Path(place) / name).relative_to(folder)
