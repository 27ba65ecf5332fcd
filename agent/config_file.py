"""Reads a config file, lays the environment over it, and says in one line where either is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

_PREFIX = "KVTALLY_"
_FILE_BYTES_MAX = 1 << 20
_SHOWN_CHARACTERS_MAX = 60
_PLACE = r"[0-9]{1,6}"

KeyPath = tuple[str | int, ...]

Shape = TypeVar("Shape", bound=msgspec.Struct)


class ConfigError(Exception):
    """The config cannot be used: file or variable, key and fault in one line; `hint` says what to do about it."""

    def __init__(self, where: str, reason: str, hint: str = "") -> None:
        text = f"{where}: {reason}"
        super().__init__("".join(each if each.isprintable() else "?" for each in text))
        self.hint = hint


class Tables(NamedTuple):
    """What a file holds with the environment laid over it; `variables` tells which variable set which key."""

    file: str
    values: dict[str, Any]
    variables: Mapping[str, str]

    def error(self, key: str, reason: str, hint: str = "") -> ConfigError:
        """The error that names the key and whoever set it."""
        variable = self.variables.get(key)
        if variable is None:
            below = next((name for path, name in self.variables.items() if path.startswith(key)), "")
            where = " with ".join(each for each in (self.file, below and f"${below}") if each) or "config"
        else:
            where = f"${variable}"
        return ConfigError(where, f"{key}: {reason}" if key else reason, hint)


def read(path: str) -> dict[str, Any]:
    """The tables of a TOML file; ConfigError when it is missing, unreadable, too large or no TOML."""
    import tomllib  # noqa: PLC0415  # a daemon without a config file never loads it

    try:
        with Path(path).open("rb") as file:
            content = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(path, error.strerror or str(error), "name another file with --config") from error
    if len(content) > _FILE_BYTES_MAX:
        raise ConfigError(path, "more than 1 MiB: this is no config file")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"no UTF-8 at byte {error.start}", "TOML files are UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, str(error), "strings need quotes, lists of tables [[double brackets]]") from error
    except RecursionError as error:
        raise ConfigError(path, "nested too deeply") from error


def overlay(file: str, values: dict[str, Any], environ: Mapping[str, str], shape: type[msgspec.Struct]) -> Tables:
    """The values with every `KVTALLY_A__B` laid over them; ConfigError for a variable that names no key.

    A name without `__` is no key: Kubernetes sets KVTALLY_PORT and the like for a service called kvtally.
    """
    variables: dict[str, str] = {}
    named = [(_path(name), name) for name in environ if name.startswith(_PREFIX) and "__" in name]
    for path, name in sorted(named, key=lambda each: [(isinstance(part, str), part) for part in each[0]]):
        leaf = _parsed(name, path, environ[name], shape)
        try:
            values = _placed(values, path, leaf)
        except LookupError as error:
            raise ConfigError(f"${name}", f"{_written(path)}: {error}") from error
        variables[_written(path)] = name
    return Tables(file, values, variables)


def decode(tables: Tables, shape: type[Shape]) -> Shape:
    """The tables as a struct; ConfigError for an unknown or missing key, a wrong type or a value out of range."""
    try:
        return msgspec.convert(tables.values, shape)
    except msgspec.ValidationError as error:
        raise _explained(str(error), tables, shape) from error


def _path(variable: str) -> KeyPath:
    """KVTALLY_ENGINE__0__URL as ("engine", 0, "url")."""
    parts = variable.removeprefix(_PREFIX).lower().split("__")
    return tuple(int(part) if re.fullmatch(_PLACE, part) else part for part in parts)


def _written(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _variable(key: str) -> str:
    return _PREFIX + re.sub(r"\[(\d+)\]", r".\1", key).replace(".", "__").upper()


def _parsed(variable: str, path: KeyPath, text: str, shape: type[msgspec.Struct]) -> Any:
    """The text of a variable in the type of its key."""
    from kvtally.agent import config_keys  # noqa: PLC0415  # needed only where a variable is set or wrong

    kind = config_keys.type_at(shape, path)
    if kind is None or _variable(_written(path)) != variable:
        raise ConfigError(f"${variable}", f"{_written(path)}: unknown key", _meant(path, shape, variable=True))
    if config_keys.is_table(kind):
        raise ConfigError(f"${variable}", f"{_written(path)} is a table", "set its keys one by one")
    raw: Any = text
    try:
        if config_keys.is_list(kind):
            stripped = text.strip()
            raw = msgspec.json.decode(stripped) if stripped.startswith("[") else _comma_list(stripped)
        return msgspec.convert(raw, kind, strict=False)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        reason = f"{_written(path)}: expected {config_keys.words(kind)}, got {_shown(text)}"
        raise ConfigError(f"${variable}", reason) from error


def _comma_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")] if text else []


def _placed(table: Any, path: KeyPath, leaf: Any) -> Any:
    """A copy of the tables with the leaf at its path; tables that are missing are made. LookupError with the reason."""
    if not path:
        return leaf
    head, rest = path[0], path[1:]
    if isinstance(head, str):
        if table is not None and not isinstance(table, dict):
            raise LookupError("the file has no table above it")
        members = table or {}
        return {**members, head: _placed(members.get(head), rest, leaf)}
    if table is not None and not isinstance(table, list):
        raise LookupError("the file has no list of tables above it")
    items = table or []
    if head > len(items):
        raise LookupError(f"{len(items)} must come before it, and the first is 0")
    before = items[head] if head < len(items) else None
    return [*items[:head], _placed(before, rest, leaf), *items[head + 1 :]]


def _explained(text: str, tables: Tables, shape: type[msgspec.Struct]) -> ConfigError:
    """What msgspec says ("Expected `int` >= 1 - at `$.engine[0].pid`") in the words of a config file."""
    from kvtally.agent import config_keys  # noqa: PLC0415  # needed only where a variable is set or wrong

    what, _, at = text.partition(" - at `$")
    path = tuple(int(place) if place else name for place, name in re.findall(rf"\[({_PLACE})\]|([^.\[\]`]+)", at))
    key = _written(path)
    field = re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", what, re.DOTALL)
    if field and field[1] == "contains unknown":
        unknown = (*path, field[2])
        return tables.error(_written(unknown), "unknown key", _meant(unknown, shape, variable=False))
    if field:
        return tables.error(key, f'"{field[2]}" is missing')
    value: Any = tables.values
    for part in path:
        value = value[part]
    hint = f"write [[{key}]]" if isinstance(value, dict) else ""
    return tables.error(
        key, f"expected {config_keys.words(config_keys.type_at(shape, path))}, got {_shown(value)}", hint
    )


def _shown(value: Any) -> str:
    """A value for a message: short, and no string that may hold a password."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and ("@" in value or len(value) > _SHOWN_CHARACTERS_MAX):
        return "another string"
    return f'"{value}"' if isinstance(value, str) else str(value)[:_SHOWN_CHARACTERS_MAX]


def _meant(path: KeyPath, shape: type[msgspec.Struct], *, variable: bool) -> str:
    """The key nearest to an unknown one, in its own table or else in any; where none is near, all of its table."""
    import difflib  # noqa: PLC0415  # needed only for a hint

    from kvtally.agent import config_keys  # noqa: PLC0415  # as above

    name, table = str(path[-1]), path[:-1]
    known = config_keys.names_at(shape, table)
    elsewhere = [key.path for key in config_keys.keys(shape)]
    if near := difflib.get_close_matches(name, known, 1):
        meant = _written((*table, near[0]))
    elif near := difflib.get_close_matches(name, [each.rpartition(".")[2] for each in elsewhere], 1):
        same = [each for each in elsewhere if each.rpartition(".")[2] == near[0]]
        meant = difflib.get_close_matches(_written(path), same, 1, cutoff=0)[0].replace("[]", "[0]")
    elif known:
        return "known here: " + ", ".join(known)
    else:
        return "known tables: " + ", ".join(config_keys.names_at(shape, ()))
    return f"did you mean {_variable(meant) if variable else meant}?"
