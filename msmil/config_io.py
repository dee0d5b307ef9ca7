"""YAML and `a.b=c` overrides into the dataclasses of msmil.config, and back; imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml

from msmil.config import Config
from shards.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment and apply overrides such as `optim.lr=1e-4` or `model.scales=[8,16,32]`.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, a value has the wrong type or range.
    """
    file = Path(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError("no such configuration", file=file, fix="name a YAML file, see configs/experiment/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"cannot be read as YAML ({text})", file=file, fix="correct it at that place") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError("holds no mapping at its top", file=file, fix="write keys such as `name: my_run`")
    for override in overrides:
        _apply_override(tree, override)
    try:
        return config_from_dict(tree)
    except UserError as error:
        if error.file is not None:
            raise
        raise UserError(error.thing, file=file, fix=error.fix) from None


class _Loader(yaml.SafeLoader):
    """Plain YAML silently lets a second `optim:` replace the first, and reads 1e-4 (without a dot) as text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written; a key that stands twice, or is no word, is an error at its line.

        Looked at before `<<: *other` is merged into it, which a key beside it may well replace.
        """
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key is a list or a mapping", key.start_mark)
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def overrides_to_dict(overrides: Sequence[str]) -> dict[str, Any]:
    """["a.b=1"] -> {"a": {"b": 1}}.

    Raises:
        UserError: one is not of that form.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply_override(tree, override)
    return tree


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """The configuration that a nested mapping describes; defaults fill what is absent.

    Raises:
        UserError: as load_config.
    """
    return cast(Config, _build(Config, tree, ""))


def config_to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain lists, dicts and scalars."""
    return cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; load_config reads it back to an equal Config."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; for comparing and logging configurations."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclasses.dataclass(frozen=True)
class Option:
    """One line of the reference: dotted key, type, default and doc."""

    key: str
    kind: str
    default: str
    doc: str


def reference() -> Iterator[Option]:
    """Every option of a configuration, from the dataclasses' own docs."""
    yield from _options(Config, "")


def _options(kind: type, prefix: str) -> Iterator[Option]:
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from _options(cast(type, hint), f"{prefix}{item.name}.")
            continue
        default = item.default if item.default is not dataclasses.MISSING else cast(Any, item.default_factory)()
        text = yaml.safe_dump(_plain(default), default_flow_style=True, width=10_000).strip().removesuffix("\n...")
        yield Option(f"{prefix}{item.name}", _type_name(hint), text, item.metadata["doc"])


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise UserError(f"override {override!r} is not of the form a.b=c", fix="write for example optim.lr=1e-4")
    try:
        value = yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError:
        raise UserError(
            f"the value of override {override!r} is no YAML", fix="quote it, for example 'a=[1, 2]'"
        ) from None
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(
                f"override {override!r}: {parent} is no section", fix="see `msmil train --help` for the keys"
            )
        node = child
    node[leaf] = value


def _build(kind: type, tree: object, prefix: str) -> object:
    if not isinstance(tree, Mapping):
        where = prefix.rstrip(".")
        raise UserError(f"{where} is {tree!r}, but it is a section", fix=f"write its keys beneath `{where}:`")
    hints = get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    for key in tree:
        if key not in names:
            raise _unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in names])
    values = {key: _coerce(hints[key], value, f"{prefix}{key}") for key, value in tree.items()}
    return kind(**values)


def _unknown_key(key: str, siblings: list[str]) -> UserError:
    every = [option.key for option in reference()]
    near = difflib.get_close_matches(key, siblings, n=1) or difflib.get_close_matches(key, every, n=1, cutoff=0.5)
    last = key.rpartition(".")[2]
    near = near or [known for known in every if known.rpartition(".")[2] == last][:1]
    fix = f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings)}"
    return UserError(f"unknown key {key}", fix=fix)


def _coerce(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(cast(type, hint), value, f"{key}.")
    result = _try_coerce(hint, value)
    if result is _NO:
        raise UserError(f"{key} is {value!r}", fix=f"give {_type_name(hint)}")
    return result


_NO = object()


def _try_coerce(hint: Any, value: Any) -> Any:
    """The value as the hinted type, or _NO."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        results = [result for arg in args if (result := _try_coerce(arg, value)) is not _NO]
        return results[0] if results else _NO
    if origin is Literal:
        return value if any(value == arg and type(value) is type(arg) for arg in args) else _NO
    if origin is tuple:
        return _try_tuple(args[0], value)
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) and all(isinstance(k, str) for k in value) else _NO
    return _try_scalar(hint, value)


def _try_tuple(item_hint: Any, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _NO
    items = [_try_coerce(item_hint, item) for item in value]
    return _NO if any(item is _NO for item in items) else tuple(items)


def _try_scalar(hint: Any, value: Any) -> Any:
    if hint is float:
        # YAML 1.1 reads 1e-4 (without a dot) as text; users mean a number
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return _NO
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _NO
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO
    assert hint in (bool, str), f"config.py uses a type that config_io does not read: {hint}"
    return value if isinstance(value, hint) else _NO


def _type_name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return "mapping"
    return {float: "number", int: "whole number", bool: "true or false", str: "text"}[hint]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
