"""The keys that a config may have, read off its structs: their paths, types and ranges in words."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORDS = {bool: "true or false", int: "integer", float: "number", str: "string", dict: "table", list: "list"}


class Key(NamedTuple):
    """One key: `path` as in a file (`engine[].url`), `default` None where nothing is known without it."""

    path: str
    type: Any
    required: bool
    default: Any
    meaning: str

    @property
    def variable(self) -> str:
        """The environment variable that overrides it; N stands for the place in a list of tables."""
        return "KVTALLY_" + self.path.replace("[]", ".N").replace(".", "__").upper()


def keys(shape: type[msgspec.Struct], prefix: str = "") -> Iterator[Key]:
    """Every key below a struct, in the order of its fields; tables and lists of tables are walked into."""
    for field in msgspec.structs.fields(shape):
        path = f"{prefix}{field.encode_name}"
        plain, constraints = _unwrapped(field.type)
        inner = _element(plain)
        if _is_table(plain):
            yield from keys(plain, f"{path}.")
        elif _is_table(inner):
            yield from keys(inner, f"{path}[].")
        else:
            meaning = next((each.description for each in constraints if each.description), "")
            default = None if field.required else field.default
            yield Key(path, field.type, field.required, default, meaning)


def type_at(shape: type[msgspec.Struct], path: tuple[str | int, ...]) -> Any:
    """The type at `("engine", 0, "url")`, or None where no key is."""
    found: Any = shape
    for part in path:
        plain, _ = _unwrapped(found)
        if isinstance(part, int):
            found = _element(plain)
        elif _is_table(plain):
            found = next((each.type for each in msgspec.structs.fields(plain) if each.encode_name == part), None)
        else:
            return None
    return found


def names_at(shape: type[msgspec.Struct], path: tuple[str | int, ...]) -> list[str]:
    """The names that the table at a path may hold; none where no table is."""
    plain, _ = _unwrapped(type_at(shape, path))
    return [field.encode_name for field in msgspec.structs.fields(plain)] if _is_table(plain) else []


def is_table(kind: Any) -> bool:
    """Whether a type is a table or a list of tables, which no single variable can hold."""
    plain, _ = _unwrapped(kind)
    return _is_table(plain) or _is_table(_element(plain))


def is_list(kind: Any) -> bool:
    """Whether a type is a list."""
    return _element(_unwrapped(kind)[0]) is not None


def words(kind: Any) -> str:
    """A type and its range in words: `number from 1 to 300`, `one of "text", "json"`, `list of strings`."""
    plain, constraints = _unwrapped(kind)
    element = _element(plain)
    if element is not None:
        text = f"list of tables ([[{plain.__name__}]])" if _is_table(plain) else _plural(element)
    elif get_origin(plain) is Literal:
        text = "one of " + ", ".join(f'"{choice}"' for choice in get_args(plain))
    else:
        text = "table" if _is_table(plain) else _WORDS[plain]
    return text + "".join(_range(each) for each in constraints)


def _plural(element: Any) -> str:
    plain, constraints = _unwrapped(element)
    if _is_table(plain):
        return "list of tables"
    return f"list of {_WORDS[plain]}s" + "".join(_range(each) for each in constraints)


def _range(constraints: msgspec.Meta) -> str:
    text = ""
    if constraints.ge is not None and constraints.le is not None:
        text += f" from {constraints.ge:,} to {constraints.le:,}"
    if constraints.max_length is not None:
        text += f", at most {constraints.max_length:,} long"
    return text


def _unwrapped(kind: Any) -> tuple[Any, tuple[msgspec.Meta, ...]]:
    """The type without `| None` and without its constraints, and the constraints, outermost first."""
    constraints: tuple[msgspec.Meta, ...] = ()
    while True:
        if get_origin(kind) is Annotated:
            kind, *found = get_args(kind)
            constraints += tuple(each for each in found if isinstance(each, msgspec.Meta))
        elif get_origin(kind) in (Union, types.UnionType):
            kind = next(each for each in get_args(kind) if each is not types.NoneType)
        else:
            return kind, constraints


def _element(plain: Any) -> Any:
    return get_args(plain)[0] if get_origin(plain) is tuple else None


def _is_table(plain: Any) -> bool:
    return isinstance(plain, type) and issubclass(plain, msgspec.Struct)
