"""A run that starts from a Hugging Face folder: each rank reads its own part of the files, and nothing is converted."""

import logging
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megamed.checkpoint.card import NOT_OF_THE_WEIGHTS
from megamed.checkpoint.hf.convert import keep_sidecar, open_folder
from megamed.checkpoint.hf.names import name_of
from megamed.models.vlm import VLMConfig

log = logging.getLogger(__name__)

T = TypeVar("T")


def model_of_folder(path: Path, now: VLMConfig) -> VLMConfig:
    """The model of a Hugging Face folder, with the settings of training of another.

    Raises:
        UserError: the folder is damaged or not understood.
    """
    return _with_training(open_folder(path).model, now)


def _with_training(model: T, now: T) -> T:
    changed: dict[str, Any] = {}
    for field in fields(model):  # type: ignore[arg-type]
        value, other = getattr(model, field.name), getattr(now, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            changed[field.name] = _with_training(value, other)
        elif field.name in NOT_OF_THE_WEIGHTS:
            changed[field.name] = other
    return replace(model, **changed)  # type: ignore[type-var]


def fill_from_folder(path: Path, state: dict[str, Any], sidecar: Path) -> None:
    """Read this rank's weights, in place, and keep what lies beside them. Collective.

    Args:
        path: the Hugging Face folder.
        state: sharded state of the model, whose data are views of the parameters; changed by this.
        sidecar: where rank 0 keeps the other files.

    Raises:
        UserError: the folder is damaged, or of another model.
    """
    folder = open_folder(path)
    incoming = folder.incoming
    apply_factories(state)
    tensors = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
    parts = []
    for tensor in tensors:
        stacked = tensor.prepend_axis_num
        name = name_of(tensor.key, tensor.global_offset[:stacked])
        parts.append((name, tuple(tensor.global_shape[stacked:]), tuple(tensor.global_offset[stacked:]), tensor.data))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {name: shape for name, shape, _, _ in parts})
    incoming.check({name: shape for shapes in gathered for name, shape in shapes.items()})
    for name, shape, offsets, data in parts:
        incoming.fill(name, shape[0], offsets, data.detach())
    if dist.get_rank() == 0:
        keep_sidecar(folder, sidecar)
        log.info("starting from the weights of %s", path)
