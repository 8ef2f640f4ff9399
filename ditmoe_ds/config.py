"""Strict configuration: dataclass defaults < YAML file < ``a.b=c`` on the command line.

Every field is typed. An unknown key or a wrong type is an error that names the key and what would be valid.
The dataclasses live beside what they configure; this module only fills them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ditmoe_ds.errors import ConfigError, in_a_line

T = TypeVar("T")

# Cached: a manifest builds hundreds of thousands of ``Shard``s, and each would look its types up anew.
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def load(cls: type[T], path: str | Path, overrides: list[str] | None = None) -> T:
    """Read a YAML file into dataclass ``cls``, then apply ``key=value`` overrides (dotted keys, YAML values).

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown, a value has the wrong type or is not finite.
    """
    try:
        tree = yaml.load(Path(path).read_text(), _Loader)
    except OSError as error:
        raise ConfigError("recipe", str(path), f"no readable file there ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("recipe", str(path), f"not valid YAML: {in_a_line(error, 500)}") from None
    if not isinstance(tree, dict):
        raise ConfigError("recipe", str(path), "the file must hold a mapping of sections")
    for override in overrides or []:
        key, sign, text = override.partition("=")
        if not sign:
            raise ConfigError("command line", override, "overrides are written key=value, for example train.steps=100")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            fix = f"not valid YAML ({in_a_line(error, 500)}); quote it for the shell and for YAML"
            raise ConfigError(key, text, fix) from None
        _set(tree, key.lstrip("-"), value)
    config = build(cls, tree)
    _check_finite(dataclasses.asdict(config), "")  # type: ignore[call-overload]
    return config


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []  # no set: YAML itself refuses, below, a key that cannot be hashed
        for name, _ in node.value:
            if (key := self.construct_object(name)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice; join the two", name.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def build(cls: type[T], tree: dict[str, Any], prefix: str = "", whole: Any = None) -> T:
    """Fill dataclass ``cls`` from nested dicts. For error messages, ``prefix`` is the dotted key of ``tree`` within the tree that fills
    ``whole``."""
    whole = whole or cls
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree:
        if name not in fields:
            near = [f"{prefix}{field}" for field in difflib.get_close_matches(str(name), fields, n=1)]
            near = [key[1:] for key in _keys(whole) if key.endswith(f".{name}")] or near  # the right name in the wrong section
            known = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{prefix}{name}", tree[name], f"unknown key; {known}")
    values = {
        name: value if type(value) is (hint := hints[name]) else _convert(hint, value, f"{prefix}{name}", whole)
        for name, value in tree.items()
    }
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            if not dataclasses.is_dataclass(hints[name]):
                raise ConfigError(f"{prefix}{name}", None, "required; add it to the recipe or the command line")
            values[name] = build(typing.cast(type, hints[name]), {}, f"{prefix}{name}.", whole)
    return cls(**values)


def dump(config: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML that ``load`` reads back to an equal object."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """``a.b: before -> now`` for every value that differs between two nested dicts, of the keys that both have."""
    found = []
    for name in before.keys() & now.keys():
        was, becomes, key = before[name], now[name], f"{prefix}{name}"
        if isinstance(was, dict) and isinstance(becomes, dict):
            found += changes(was, becomes, f"{key}.")
        elif was != becomes:
            found.append(f"{key}: {was} -> {becomes}")
    return sorted(found)


def _keys(cls: Any, prefix: str = ".") -> list[str]:
    """Dotted keys of all values in a dataclass and its sections, each with a dot in front."""
    keys = []
    for name, hint in _hints(cls).items():
        keys += _keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [f"{prefix}{name}"]
    return keys


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for depth, name in enumerate(parents):
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(dotted, value, f"{'.'.join(parents[: depth + 1])} is a value, not a section")
    tree[leaf] = value


def _check_finite(value: Any, key: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, value, "must be finite")
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, part in parts:
        _check_finite(part, f"{key}.{name}".lstrip("."))


def _convert(hint: Any, value: Any, key: str, whole: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        return _convert(options[0], value, key, whole)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if not any(type(choice) is type(value) and choice == value for choice in choices):  # 1 == True
            raise ConfigError(key, value, f"choose one of {', '.join(map(repr, choices))}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(key, value, "expected a list, for example [0, 1, 2]")
        of = typing.get_args(hint)[0]
        return origin(item if type(item) is of else _convert(of, item, f"{key}[{i}]", whole) for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(key, value, "expected a section of key: value lines")
        return build(typing.cast(type, hint), value, f"{key}.", whole)
    if hint is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)  # YAML 1.1 reads 1e-4 as a string
    if type(value) is not hint:
        raise ConfigError(key, value, f"expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")
    return value
