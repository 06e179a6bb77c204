"""TOML file + `section.key=value` overrides -> one frozen dataclass, with every mistake reported
at once.

The dataclass of a section lives in the file that owns it and carries the defaults; there is no
inheritance between files. Values are checked by pydantic in strict mode: no silent conversion, no
unknown key, no NaN.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import ConfigError

T = TypeVar("T")

_RULES = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def load_config(
    schema: type[T],
    path: str | None,
    overrides: Sequence[str] = (),
    *,
    other_sections: bool = False,
) -> T:
    """Build a `schema` from a TOML file (or none) and `section.key=value` overrides.

    With `other_sections` the file may have sections that the schema has not: they are somebody
    else's and not looked at.

    An override's value is read as TOML (`4`, `0.1`, `true`, `[0.14, 1.0]`); what is no TOML value
    is taken as a plain string, so `loader.dataset=s3://bucket/prefix` needs no quotes.

    Raises ConfigError naming every wrong, missing or unknown key.
    """
    tree = _read_file(path) if path else {}
    if other_sections:
        own = {section.name for section in dataclasses.fields(schema)}  # type: ignore[arg-type]
        tree = {name: section for name, section in tree.items() if name in own}
    mistakes = [m for text in overrides if (m := _apply_override(tree, text))]
    config, more = _validate(schema, tree)
    mistakes += more
    if mistakes or config is None:
        where = path or "the command line"
        listed = "\n".join(f"  {mistake}" for mistake in mistakes)
        raise ConfigError(f"{len(mistakes)} mistake(s) in {where}:\n{listed}")
    return config


def parse_config(schema: type[T], text: str, *, where: str) -> T:
    """Rebuild a `schema` from what `dump_config` wrote. Raises ConfigError."""
    config, mistakes = _validate(schema, tomllib.loads(text))
    if config is None:
        listed = "\n  ".join(mistakes)
        raise ConfigError(f"{where} holds a configuration of another version:\n  {listed}")
    return config


def dump_config(config: Any) -> str:
    """The resolved configuration as TOML, section by section, readable back by `load_config`."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        keys = [field.name for field in dataclasses.fields(values)]
        lines += [f"{key} = {_toml(getattr(values, key))}" for key in keys]
        lines.append("")
    return "\n".join(lines)


def _read_file(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path!r}; presets are in configs/") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path!r}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Set one override in place; return what is wrong with it, or None."""
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        return f"{text!r}: an override is written section.key=value"
    section = tree.setdefault(parts[0], {})
    if not isinstance(section, dict):
        return f"{text!r}: {parts[0]!r} is not a section"
    section[parts[1]] = _parse_value(value.strip())
    return None


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _validate(schema: type[T], tree: Mapping[str, Any]) -> tuple[T | None, list[str]]:
    try:
        # JSON mode is strict about types but lets a TOML array fill a tuple and an integer fill a
        # float.
        text = json.dumps(tree, default=str)
        return TypeAdapter(_with_rules(schema)).validate_json(text), []
    except ValidationError as error:
        return None, [_describe(schema, dict(e)) for e in error.errors()]
    except ValueError as error:
        return None, [str(error)]


def _with_rules(schema: type[T]) -> type[T]:
    """Attach our rules to a dataclass and all within, which therefore need not know pydantic."""
    schema.__pydantic_config__ = _RULES  # type: ignore[attr-defined]
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if (inner := _table_of(field.type)) is not None:
            _with_rules(inner)
    return schema


def _table_of(annotation: Any) -> Any:
    """The dataclass that a field holds, one or a tuple of them; None of plain values."""
    for found in (annotation, *get_args(annotation)):
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            return found
    return None


def _describe(schema: type, error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{name}: unknown key; known here: {', '.join(_known_keys(schema, location[:-1]))}"
    if error["type"] in ("missing", "missing_argument"):
        override = f" or as {name}=…" if len(location) <= 2 else ""  # none reaches into a table
        return f"{name}: missing; set it in the file{override}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {message} (got {error['input']!r})" if location[1:] else f"{name}: {message}"


def _known_keys(schema: Any, path: Sequence[str]) -> list[str]:
    for part in path:
        types = {field.name: field.type for field in dataclasses.fields(schema)}
        if part in types:  # else the place in an array of tables
            schema = _table_of(types[part])
    return [field.name for field in dataclasses.fields(schema)]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return "{" + ", ".join(f"{name} = {_toml(getattr(value, name))}" for name in names) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML forbids it
    return repr(value)
