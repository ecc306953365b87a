"""Safetensors files, written one tensor at a time, with headers that were there before or as the library makes them."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megamed.checkpoint.aside import written_aside
from megamed.checkpoint.hf.source import NAMES, SINGLE, Entry, Header
from megamed.checkpoint.spans import Span, copy_spans
from megamed.utils import UserError
from megamed.utils.files import sync

# transformers' default for `save_pretrained`.
SHARD_BYTES = 5 * 10**9

# Larger types stand first, as in the safetensors library, so that all are aligned.
_ORDER = ("F64", "I64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")

Plan = dict[str, Header]
"""Headers by name of their file."""


def plan_files(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int = SHARD_BYTES
) -> tuple[Plan, str | None]:
    """Lay tensors out in files, as transformers' `save_pretrained` does.

    Args:
        shapes: shape and type by name, in the order in which files are filled.
        shard_bytes: most bytes of a file.

    Returns:
        Headers by file, and the text of the index; None for one file.
    """
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name, (shape, dtype) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if sizes[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    if len(shards) == 1:
        return {SINGLE: _header(shards[0], shapes)}, None
    plan: Plan = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        plan[file] = _header(names, shapes)
        weight_map |= dict.fromkeys(names, file)
    num_parameters = sum(torch.Size(shape).numel() for shape, _ in shapes.values())
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": sum(sizes)},
        "weight_map": weight_map,
    }
    return plan, json.dumps(index, indent=2, sort_keys=True) + "\n"


def _header(names: Sequence[str], shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Header:
    ordered = sorted(names, key=lambda name: (_ORDER.index(NAMES[shapes[name][1]]), name))
    values: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    entries, place = [], 0
    for name in ordered:
        shape, dtype = shapes[name]
        end = place + torch.Size(shape).numel() * dtype.itemsize
        entries.append(Entry(name, NAMES[dtype], tuple(shape), place, end))
        values[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    return Header(text + " " * (-len(text.encode()) % 8), tuple(entries))


def write_safetensors(
    target: Path,
    plan: Plan,
    make: Callable[[str], Tensor],
    identity: str,
    prepare: Callable[[Path], Any] = lambda aside: None,
    find: Callable[[str], Sequence[Span] | None] = lambda name: None,
) -> int:
    """Write a folder of files; until it is complete it has another name.

    Args:
        target: the folder.
        plan: headers by file.
        make: makes a tensor, in the type and shape that its header says; in the order of files and places.
        identity: what it is made of and how; a killed writing of the same identity is gone on with.
        prepare: puts further files into the folder that it is given.
        find: says of a tensor where its bytes are, and it is copied and not made; all of them, in their order. None:
            it has to be made.

    Returns:
        Bytes of tensors.

    Raises:
        UserError: the disk is full or not writable.
    """
    total = sum(header.file_bytes for header in plan.values())
    with (
        written_aside(target, total, identity) as aside,
        tqdm(total=total, unit="B", unit_scale=True, desc="write", disable=not sys.stderr.isatty()) as bar,
    ):
        prepare(aside)
        # Copied by the system, files are written two at a time; what is made takes memory, and is so one by one.
        is_copied = all(find(entry.name) is not None for header in plan.values() for entry in header.entries)
        with ThreadPoolExecutor(2 if is_copied else 1) as pool:
            jobs = [pool.submit(_write_file, aside / file, plan[file], make, find, bar.update) for file in plan]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return total


def _write_file(
    path: Path,
    header: Header,
    make: Callable[[str], Tensor],
    find: Callable[[str], Sequence[Span] | None],
    advance: Callable[[int], Any],
) -> None:
    """Write a file, or what lacks of it: whole tensors that are there already are kept."""
    path.touch()
    with open(path, "r+b") as file:
        there = file.seek(0, os.SEEK_END)
        ends = [header.num_bytes, *(header.num_bytes + entry.end for entry in header.entries)]
        kept = max((end for end in ends if end <= there), default=0)
        file.truncate(kept)
        file.seek(kept)
        advance(kept)
        if kept == 0:
            file.write(header.encode())
            advance(header.num_bytes)
        for entry in header.entries:
            if header.num_bytes + entry.end > max(kept, header.num_bytes) or entry.start == entry.end:
                if (spans := find(entry.name)) is not None:
                    file.flush()
                    copy_spans(spans, file.fileno(), file.tell(), advance)
                    file.seek(0, os.SEEK_END)
                    continue
                tensor = make(entry.name).contiguous()
                if NAMES[tensor.dtype] != entry.dtype or tuple(tensor.shape) != entry.shape:
                    raise UserError(
                        f"{entry.name} is {tuple(tensor.shape)} {tensor.dtype} now, and {entry.shape} {entry.dtype} "
                        "in the folder that the model came from; give a --dtype, or export without that folder's files"
                    )
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                advance(entry.end - entry.start)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)

