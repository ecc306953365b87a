"""Composing a configuration from YAML files and command-line overrides with Hydra, and writing it out."""

import dataclasses
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megamed.config.load import did_you_mean, interpolation_error
from megamed.utils import UserError


def compose(config_dir: str | Path, config_name: str, overrides: list[str]) -> dict[str, Any]:
    """The values of a run: `config_name`.yaml, the files that it names, and the overrides, as plain Python.

    Overrides have Hydra's grammar: `group=option` replaces and `+group=option` adds a file, `key=value`
    sets a value, `~key` removes one. A value needs no `+`, whether YAML has the key or not: whether
    the key exists is for the dataclasses to say, in `megamed.config.load`.

    Args:
        config_dir: folder of the YAML files; a folder in it is a config group.
        config_name: name of the primary file, without its suffix.
        overrides: what the command line says.

    Raises:
        UserError: a file, group or interpolated key that does not exist, an override that cannot be
            read, or a file that is no YAML; with the nearest right name where there is one.
    """
    folder = Path(config_dir).resolve()
    if not folder.is_dir():
        raise UserError(f"{config_dir}: no such folder; it should hold {config_name}.yaml", everywhere=True)
    lines = [_prepare(text, folder) for text in overrides]
    try:
        with hydra.initialize_config_dir(str(folder), version_base=None):
            config = hydra.compose(config_name, lines)
        values = OmegaConf.to_container(config, resolve=True)
    except MissingConfigException as error:
        missing = (error.missing_cfg_file or config_name).strip("/").removesuffix(".yaml")
        raise UserError(_no_such_file(missing, folder, overrides), everywhere=True) from error
    except HydraException as error:
        raise UserError(_reason(error), everywhere=True) from error
    except OmegaConfBaseException as error:
        raise interpolation_error(error) from error
    except yaml.YAMLError as error:
        raise UserError(f"cannot be read as YAML: {error}", everywhere=True) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def to_yaml(config: Any) -> str:
    """The dataclass as YAML, keys in the order of its fields; `load` makes the same dataclass of it."""
    return OmegaConf.to_yaml(OmegaConf.create(_to_plain(config)))


def _prepare(text: str, folder: Path) -> str:
    """The override as Hydra shall see it: values are set whether or not YAML has the key."""
    override = _parse(text)
    key = override.key_or_group
    if override.is_sweep_override():
        raise UserError(f"{text}: one value is needed here; write {key}=[...] for a list, "
                        "or put text that has a comma in quotes", everywhere=True)
    if override.is_delete() or override.package is not None:
        return text
    option = override.value()
    if (folder / key).is_dir():
        if not isinstance(option, str | list):
            raise UserError(f"{text}: {key} is a config group, and takes the name of a file in "
                            f"{folder.name}/{key}", everywhere=True)
        return text
    groups = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir())
    # A value's key may look like a group's name. That the group has such a file tells that it was meant.
    meant = [group for group in groups if (folder / group / f"{option}.yaml").is_file()]
    hint = did_you_mean(key, meant, f"{_plus(text)}{{}}={option}")
    if "/" in key or ("." not in key and hint and not override.is_force_add()):
        raise UserError(f"{text}: no such config group {key}; {hint or 'there are: ' + ', '.join(groups)}",
                        everywhere=True)
    return "++" + text.lstrip("+")


def _parse(text: str) -> Override:
    try:
        if text.lstrip("+~").startswith("="):
            raise HydraException("there is no key before the =")
        return OverridesParser.create().parse_overrides([text])[0]
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{text}: cannot be read as an override ({reason}); write key=value, and put a value "
                        "with special characters in quotes", everywhere=True) from error


def _reason(error: HydraException) -> str:
    """What Hydra found wrong, with its cause, and with a mend that is right on a command line."""
    reason = str(error)
    if reason.startswith("Multiple values for"):
        return f"{reason.partition('.')[0]}; to replace the one there is, write group=option without a +"
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ is not None else ""
    return ": ".join(part for part in (reason, cause) if part)


def _no_such_file(missing: str, folder: Path, overrides: list[str]) -> str:
    """The message for a YAML file that someone named and that is not there."""
    group, _, option = missing.rpartition("/")
    options = sorted(path.stem for path in (folder / group).glob("*.yaml"))
    assignment = f"{group}={option}" if group else option
    said = next((text for text in overrides if text.lstrip("+") == assignment), assignment)
    hint = did_you_mean(option, options, f"{_plus(said)}{group}={{}}" if group else "{}")
    known = f"there are: {', '.join(options)}"
    return f"{said}: no such file {folder.name}/{missing}.yaml; {f'{hint} ({known})' if hint else known}"


def _plus(text: str) -> str:
    return "+" if text.startswith("+") else ""


def _to_plain(value: Any) -> Any:
    """Dataclasses as dicts of the fields that can be set, and tuples as lists: what YAML can hold."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return {name: _to_plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value
