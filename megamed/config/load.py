"""Strict loading of plain values into dataclasses: the dataclass is the schema, YAML holds values."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megamed.utils import UserError

T = TypeVar("T")

# Hydra's mark for a value that whoever runs the program has to give.
MISSING = "???"

_INVALID = object()
_NAMES: dict[Any, str] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null",
}


def load(cls: type[T], values: Mapping[Any, Any], path: str = "") -> T:
    """An instance of the dataclass `cls` with `values` in it, each checked against its annotation.

    Annotations may be int, float (takes an int, too), bool, str, None, Any, Literal, list, tuple, dict,
    dataclasses, and unions of these. Nothing is converted that changes its meaning: text is no
    number, a bool is no int. Lists become tuples where the field is one. A field whose value is the
    text `???` counts as not given.

    Args:
        cls: the dataclass.
        values: nested mappings and lists, or an OmegaConf container, whose interpolations are resolved.
        path: dotted key of `values` in the whole configuration, for the messages.

    Raises:
        UserError: unknown keys with the nearest right ones, values of another type, required values
            that are missing, and what a dataclass's own `__post_init__` says, all in one message.
    """
    loader = _Loader(cls, path, [])
    loaded = loader.convert(cls, _plain(values), path)
    if loader.errors:
        raise UserError("; ".join(loader.errors), everywhere=True)
    return loaded


def did_you_mean(word: str, candidates: Iterable[str], form: str = "{}") -> str:
    """`did you mean parallel.tensor?`, with the nearest of the candidates, or "" if none is near.

    Args:
        word: what was written.
        candidates: what could have been meant.
        form: how to show a candidate ("parallel.{}"); kept out of the comparison, where a long prefix
            would make everything look alike.
    """
    near = difflib.get_close_matches(word, list(candidates), n=2)
    return f"did you mean {' or '.join(form.format(name) for name in near)}?" if near else ""


def interpolation_error(error: OmegaConfBaseException) -> UserError:
    """What OmegaConf found wrong with an interpolation, on one line."""
    where = f"{error.full_key}: " if error.full_key else ""
    return UserError(where + str(error).splitlines()[0], everywhere=True)


@dataclasses.dataclass
class _Loader:
    """One pass over the values, collecting what is wrong with them.

    Attributes:
        root: the dataclass at the top, searched for keys that were written at the wrong level.
        root_path: dotted key of the top.
        errors: one sentence for each fault so far.
    """

    root: type
    root_path: str
    errors: list[str]

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        """The value as the annotation wants it; `_INVALID`, and an error noted, if it does not fit."""
        origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return self._union(hint, value, path)
        if origin is Literal:
            return self._literal(arguments, value, path)
        if dataclasses.is_dataclass(hint):
            return self._dataclass(hint, value, path)
        if origin in (list, tuple) and isinstance(value, list | tuple):
            return self._sequence(origin, arguments, value, path)
        if origin is dict and isinstance(value, Mapping):
            return self._dict(arguments or (Any, Any), value, path)
        if hint is Any or type(value) is hint:
            return value
        if hint is float and type(value) is int:
            return float(value)
        return self._unexpected(hint, value, path)

    def _unexpected(self, hint: Any, value: Any, path: str) -> Any:
        mend = ""
        if hint is str and isinstance(value, int | float):
            mend = "; put it in quotes"
        elif hint is int and isinstance(value, float) and value.is_integer():
            mend = f"; write {int(value)}"
        self.errors.append(f"{path}: expected {_describe(hint)}, not {_show(value)}{mend}")
        return _INVALID

    def _literal(self, choices: tuple[Any, ...], value: Any, path: str) -> Any:
        # By type as well, because True == 1.
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        hint = did_you_mean(str(value), [choice for choice in choices if isinstance(choice, str)])
        known = f"choices: {', '.join(_show(choice) for choice in choices)}"
        self.errors.append(f"{path}: {_show(value)} is no choice; {f'{hint} ({known})' if hint else known}")
        return _INVALID

    def _union(self, hint: Any, value: Any, path: str) -> Any:
        members = typing.get_args(hint)
        if type(value) in members:
            return value
        inner: list[list[str]] = []
        for member in members:
            trial = _Loader(self.root, self.root_path, [])
            loaded = trial.convert(member, value, path)
            if not trial.errors:
                return loaded
            if _holds(member, value):
                inner.append(trial.errors)
        if not inner:
            return self._unexpected(hint, value, path)
        # Of the members that are of the value's shape, the one that it fits best was meant.
        nearest = min(inner, key=len)
        self.errors.extend(nearest)
        return _INVALID

    def _sequence(self, origin: type, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
        if origin is list:
            hints = (arguments or (Any,)) * len(value)
        elif not arguments or arguments[-1] is Ellipsis:
            hints = (arguments or (Any,))[:1] * len(value)
        else:
            hints = arguments
        if len(hints) != len(value):
            self.errors.append(f"{path}: expected {len(hints)} values, not {len(value)} ({_show(value)})")
            return _INVALID
        items = [self.convert(hint, item, f"{path}[{index}]")
                 for index, (hint, item) in enumerate(zip(hints, value, strict=True))]
        return origin(items)

    def _dict(self, hints: tuple[Any, ...], value: Mapping[Any, Any], path: str) -> Any:
        key_hint, value_hint = hints
        keys = [self.convert(key_hint, key, f"{path}, key {key}") for key in value]
        items = [self.convert(value_hint, item, f"{path}.{key}") for key, item in value.items()]
        return dict(zip(keys, items, strict=True))

    def _dataclass(self, cls: Any, value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            mend = "; write {} for its defaults" if value is None else ""
            self.errors.append(f"{path or cls.__name__}: expected keys and values, not {_show(value)}{mend}")
            return _INVALID
        num_before = len(self.errors)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for key in value:
            if key not in fields:
                self.errors.append(self._unknown(str(key), list(fields), path))
        hints = typing.get_type_hints(cls)
        arguments: dict[str, Any] = {}
        for name, field in fields.items():
            key = _join(path, name)
            if name in value and value[name] != MISSING:
                arguments[name] = self.convert(hints[name], value[name], key)
            elif name in value or not _has_default(field):
                self.errors.append(f"{key}: a value is required ({_describe(hints[name])}); give {key}=...")
        if len(self.errors) > num_before:
            return _INVALID
        try:
            return cls(**arguments)
        except UserError as error:
            self.errors.append(str(error))
            return _INVALID

    def _unknown(self, key: str, names: list[str], path: str) -> str:
        hint = did_you_mean(key, names, _join(path, "{}"))
        if not hint:
            elsewhere = [dotted for dotted in _all_keys(self.root, self.root_path)
                         if dotted.rpartition(".")[2] == key]
            if elsewhere:
                hint = f"did you mean {' or '.join(elsewhere[:2])}?"
        return f"{_join(path, key)}: no such key; {hint or 'valid keys: ' + ', '.join(names)}"


def _plain(values: Any) -> Any:
    if not OmegaConf.is_config(values):
        return values
    try:
        return OmegaConf.to_container(values, resolve=True)
    except OmegaConfBaseException as error:
        raise interpolation_error(error) from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _holds(hint: Any, value: Any) -> bool:
    """Whether the annotation is a container of the kind that the value is."""
    origin = typing.get_origin(hint) or hint
    if isinstance(value, Mapping):
        return origin is dict or dataclasses.is_dataclass(hint)
    return isinstance(value, list | tuple) and origin in (list, tuple)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(_show(choice) for choice in arguments)
    if origin in (list, tuple):
        return "a list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "keys and values"
    if hint is Any:
        return "any value"
    return _NAMES[hint]


def _show(value: Any) -> str:
    """The value as YAML would have it, cut to a length that leaves the message readable."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _all_keys(cls: Any, path: str) -> Iterator[str]:
    """Dotted keys of a dataclass and of those in it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = _join(path, field.name)
        yield key
        for member in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(member):
                yield from _all_keys(member, key)
