"""What a checkpoint says of itself, in text: `megamed.json`, its card. How checkpoints and models are found by it.

A card's `model` has the settings of the model under dotted keys, without those that say how it is trained.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamed.config import load
from megamed.models.vlm import VLMConfig
from megamed.utils import UserError

CARD = "megamed.json"
MEND_DAMAGED = "move that folder away, and run again to go on from the one before"

_NAME = re.compile(r"step_(\d{8})")
_MOE, _POOL = "language.moe.", re.compile(r"language\.moe\.pools\.(\w+)\.num_experts")

# Settings of training or of the machine, which the same weights may have with any value.
NOT_OF_THE_WEIGHTS = (
    "recompute", "frames_per_pass", "frames_in_flight", "dispatcher", "grouped_gemm", "aux_loss_coeff", "z_loss_coeff",
    "name", "routing", "specialty_dropout", "prior_init", "balance", "bias_update_rate", "match", "labels", "log_every",
)  # fmt: skip


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / CARD).is_file())


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.rpartition("_")[2])


def find_checkpoint(path: Path, key: str) -> Path:
    """The checkpoint that a path means: itself, or the newest one of a run.

    Args:
        path: a checkpoint's folder, a run's folder, or the folder of a run's checkpoints.
        key: the option or setting that the path was given by, for the message.

    Raises:
        UserError: there is none.
    """
    if (path / CARD).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := list_checkpoints(folder):
            return found[-1]
    what = f"holds no checkpoint (no {CARD}, and no step_NNNNNNNN that has one)" if path.is_dir() else "is no folder"
    raise UserError(f"{key}={path}: {what}; name a checkpoint's folder, or the folder of a run", everywhere=True)


def read_card(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, consumed microbatches, layout, model.

    Raises:
        UserError: the card is missing or damaged.
    """
    try:
        card = json.loads((checkpoint / CARD).read_text())
        missing = [key for key in ("step", "model", "layout", "world_size") if key not in card]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint}: {CARD} cannot be read ({error}); {MEND_DAMAGED}") from error
    if missing:
        raise UserError(f"{checkpoint}: {CARD} has no {missing[0]}; {MEND_DAMAGED}")
    return card


def describe_model(config: VLMConfig) -> dict[str, Any]:
    """A model's settings as a card has them: nested ones under dotted keys, those of the weights alone."""
    return dict(_flat(asdict(config)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in NOT_OF_THE_WEIGHTS:
            yield f"{prefix}{key}", value


def model_of(checkpoint: Path) -> VLMConfig:
    """The model that a checkpoint is of; settings that no card has are at their defaults.

    Raises:
        UserError: the card is damaged, or of a megamed that had other settings.
    """
    nested: dict[str, Any] = {}
    for dotted, value in read_card(checkpoint)["model"].items():
        *folders, name = dotted.split(".")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    try:
        return load(VLMConfig, nested, "model")
    except UserError as error:
        raise UserError(f"{checkpoint}: its model is not one of this version of megamed ({error})") from error


def differing_key(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting in which two models differ, and its values; None for models whose weights fit each other.

    Args:
        was: `model` of a card. What it lacks is at its default: a card may be older than a setting.
        now: likewise, of the other model.
    """
    defaults = describe_model(VLMConfig())
    experts = [_experts(model) for model in (was, now)]
    if experts[0] != experts[1]:
        return "language.moe", _say_experts(experts[0]), _say_experts(experts[1])
    for key in [*now, *(key for key in was if key not in now)]:
        if key.startswith(_MOE) and (not experts[0] or _POOL.fullmatch(key)):
            continue  # without meaning in a dense model; compared above
        before, after = (model.get(key, defaults.get(key)) for model in (was, now))
        if before != after:
            return key, before, after
    return None


def _experts(model: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Names and sizes of the pools, in the order that numbers the experts; none for a dense model."""
    pools = [(found[1], size) for key, size in model.items() if (found := _POOL.fullmatch(key))]
    plain = model.get(f"{_MOE}num_experts", 0)
    return pools or ([("", plain)] if plain else [])


def _say_experts(pools: list[tuple[str, int]]) -> str:
    if not pools:
        return "dense"
    return " ".join(f"{name}={size}" if name else f"num_experts={size}" for name, size in pools)
