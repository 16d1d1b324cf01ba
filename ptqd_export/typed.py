"""Convert plain JSON or TOML values to frozen dataclasses and back.

The dataclasses may be nested, and their types are checked here, not by hand. A class with a plain form of its
own has two methods: `to_plain(self)` and the class method `from_plain(value)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Literal

from .errors import RecipeError

SHOWN = 100
"""Most characters of a value that a message quotes."""


def brief(value: object) -> str:
    """`value` as part of a message: one line, at most SHOWN characters, and no terminal control codes."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number with more digits than Python prints, or deep nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def visible(text: str) -> str:
    """`text` with all characters that cannot be printed, but ends of lines, as their escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def to_plain(value: Any) -> Any:
    """`value` in the form that JSON holds: dataclasses as tables, tuples as arrays, enums as text.

    `read_typed` converts back.
    """
    if hasattr(value, "to_plain"):
        return value.to_plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in _fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Enum) else value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a class's fields; a file may hold the same class many times."""
    return typing.get_type_hints(kind)


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields in a dataclass's plain form: all except those whose metadata `plain` is False."""
    return [field for field in dataclasses.fields(kind) if field.metadata.get("plain", True)]


def _key(key: Any) -> str:
    return str(key.to_plain() if hasattr(key, "to_plain") else key)


def read_typed(kind: Any, value: Any, where: str) -> Any:
    """Convert a plain value to the type `kind`.

    Dataclasses and mappings come from tables, tuples from arrays; an int becomes a float where one is wanted.

    Args:
        kind: a class, a Literal, a tuple, a Mapping, or a union of these; the keys of the value decide
            between the dataclasses of a union.
        where: place of the value, for messages, such as "recipe.sampler.eta".
    Raises:
        RecipeError: a key is unknown or missing, or a value has another type; says where, and what was
            expected.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if hasattr(kind, "from_plain"):
        return kind.from_plain(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(kind, value, where)
    if origin is tuple:
        return _read_tuple(args, value, where)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a table, got {brief(value)}")
        return {
            read_typed(args[0], key, f"{where} (key)"): read_typed(args[1], item, _place(where, key))
            for key, item in value.items()
        }
    if origin is Literal:
        if value not in args:
            raise RecipeError(f"{where}: got {brief(value)}, expected one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _read_union(args, value, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        for member in kind:
            if member.value == value:
                return member
        expected = ", ".join(str(member) for member in kind)
        raise RecipeError(f"{where}: got {brief(value)}, expected one of {expected}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise RecipeError(f"{where}: expected a finite number, got {brief(value)}") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{where}: expected {kind.__name__}, got {brief(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: expected a finite number, got {value}")
    return value


def _place(where: str, key: object) -> str:
    """The place of a mapping's item, for messages.

    The key comes from the file, so it is quoted unless it is short and plain.
    """
    plain = isinstance(key, str) and len(key) <= SHOWN and key.isascii() and key.isprintable()
    return f"{where}.{key}" if plain else f"{where}[{brief(key)}]"


def _read_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a table, got {brief(value)}")
    hints = _hints(kind)
    fields = {field.name: field for field in _fields(kind)}
    for key in value:
        if key not in fields:
            raise RecipeError(f"{where}: unknown key {brief(key)}: {_suggestion(str(key), fields)}")
    for name, field in fields.items():
        absent = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if absent and name not in value:
            raise RecipeError(f"{where}: {name!r} is missing")
    return kind(**{key: read_typed(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _suggestion(key: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"


def _read_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{where}: expected an array, got {brief(value)}")
    kinds = [args[0]] * len(value) if args[-1] is ... else args
    if len(kinds) != len(value):
        raise RecipeError(f"{where}: expected an array of {len(kinds)}, got {len(value)}")
    return tuple(
        read_typed(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _read_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    kinds = [kind for kind in args if kind is not type(None)]
    if value is None and len(kinds) < len(args):
        return None
    if len(kinds) > 1:
        keys = set(value) if isinstance(value, dict) else set()
        kinds = [
            kind for kind in kinds if {field.name for field in dataclasses.fields(kind)} == keys
        ] or kinds[:1]
    return read_typed(kinds[0], value, where)
