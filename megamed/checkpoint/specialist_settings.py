"""Settings of experts on their way: from a command line or a file of conf/model/moe, and back to both."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megamed.checkpoint.card import describe_model, differing_key
from megamed.checkpoint.specialists import with_moe
from megamed.config import compose, load, to_yaml
from megamed.models.moe import MoEConfig, PoolConfig
from megamed.models.vlm import VLMConfig
from megamed.runtime import ParallelConfig
from megamed.utils import UserError

KEY = "model.language.moe"
MOE_FILE = "moe.yaml"


def parse_pairs(texts: Sequence[str], option: str, meaning: str, example: str) -> dict[str, str]:
    """`["chest=4", "neuro=4"]` as a dict, in that order.

    Raises:
        UserError: a text has no `=`, or two have the same name.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} {text}: is no pair; write NAME={meaning}, for instance chest={example}")
        if name in found:
            raise UserError(f"{option}: pools overlap: {name} is given twice; give each pool once")
        found[name] = value
    return found


def pools_of(texts: Sequence[str]) -> dict[str, PoolConfig]:
    """Pools by `NAME=SIZE`.

    Raises:
        UserError: a size is no number from 1 on, or a name is there twice.
    """
    sizes = parse_pairs(texts, "--pools", "SIZE", "4")
    for name, size in sizes.items():
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"--pools {name}={size}: a pool has 1 expert or more; leave out a pool that has none")
    return {name: PoolConfig(int(size)) for name, size in sizes.items()}


def read_moe(path: Path, model: VLMConfig) -> MoEConfig:
    """Settings of a file of conf/model/moe, or of one like it.

    Args:
        path: the file.
        model: what its references to other settings (`${model.language.intermediate_size}`) are looked up in.

    Raises:
        UserError: it cannot be read, or a key in it is unknown.
    """
    try:
        values = OmegaConf.load(path)
        whole = OmegaConf.create({"model": asdict(with_moe(model, MoEConfig()))})
        OmegaConf.update(whole, KEY, values, merge=False)
        resolved = OmegaConf.to_container(OmegaConf.select(whole, KEY), resolve=True)
    except OSError as error:
        raise UserError(f"--pools {path}: cannot be read ({error.strerror})") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"--pools {path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(resolved, Mapping) or not resolved.get("pools"):
        raise UserError(f"--pools {path}: has no pools; write a file like conf/model/moe/specialists.yaml")
    return load(MoEConfig, resolved, KEY)


def check(config: VLMConfig) -> None:
    """Check a new model's settings by themselves.

    Raises:
        UserError: names the key and the mend.
    """
    config.validate()
    config.language.validate(ParallelConfig())


def moe_yaml(moe: MoEConfig) -> str:
    """A file for conf/model/moe."""
    return f"# @package {KEY}\n{to_yaml(moe)}"


def instructions(config: VLMConfig, checkpoint: Path, conf: Path, overrides: Sequence[str]) -> str:
    """The commands that train a checkpoint further.

    Args:
        config: its model.
        checkpoint: its folder, where `moe.yaml` is.
        conf: the folder of the configuration.
        overrides: further ones.
    """
    moe = config.language.moe
    lines = []
    if any(pool.match or pool.labels for pool in moe.pools.values()):
        # Rules are long, and belong in a file.
        name = checkpoint.name.lower().replace(".", "_")
        place = f"conf/model/moe/{name}.yaml"
        lines.append(f"cp {shlex.quote(str(checkpoint / MOE_FILE))} {shlex.quote(place)}")
        settings = [f"model/moe={name}"]
    else:
        settings = _overrides(moe)
    words = [*_model_option(config, conf), *settings, f"init.checkpoint={checkpoint}", *overrides]
    lines.append(" ".join(["torchrun --nproc-per-node 2 launch/pretrain.py", *map(shlex.quote, words)]))
    return "\n".join(lines)


def _overrides(moe: MoEConfig) -> list[str]:
    """Settings that differ from their defaults, as Hydra takes them."""
    pools = ",".join(f"{name}:{{num_experts:{pool.num_experts}}}" for name, pool in moe.pools.items())
    plain = [field.name for field in fields(moe) if field.name != "pools"]
    default = MoEConfig()
    changed = [name for name in plain if getattr(moe, name) != getattr(default, name)]
    return [f"{KEY}.pools={{{pools}}}", *(f"{KEY}.{name}={getattr(moe, name)}" for name in changed)]


def _model_option(config: VLMConfig, conf: Path) -> list[str]:
    """`model=NAME` if there is a file for a model of these sizes."""
    plain: dict[str, Any] = describe_model(with_moe(config, MoEConfig()))
    for path in sorted((conf / "model").glob("*.yaml")):
        values = compose(conf, "pretrain", [f"model={path.stem}"])["model"]
        if differing_key(describe_model(load(VLMConfig, values, "model")), plain) is None:
            return [f"model={path.stem}"]
    return []
