"""Plain values to typed ones, by the annotations of dataclasses and constructors, with messages that name the key."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from labeleff.errors import RecipeError, did_you_mean
from labeleff.recipe import Component

T = TypeVar("T")


def from_mapping(kind: type[T], value: Any, where: str) -> T:
    """Return a dataclass made from a mapping.

    Args:
        kind: The dataclass.
        value: Plain values.
        where: Dotted key, for messages.

    Raises:
        RecipeError: A key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where or 'recipe'}: {_shown(value)} is not a mapping of keys to values")
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # callers pass dataclasses
    for key in value:
        if key not in known:
            raise RecipeError(
                f"{_join(where, str(key))}: unknown key.{did_you_mean(str(key), known)} Known: {', '.join(known)}"
            )
    made = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in value:
            made[field.name] = convert(value[field.name], hints[field.name], _join(where, field.name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"{_join(where, field.name)}: this key is needed")
    return kind(**made)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Return a value of the annotated type.

    Raises:
        RecipeError: It is not of that type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind is Component:
        return _component(value, where)
    if is_dataclass(kind) and isinstance(kind, type):
        return from_mapping(kind, value, where)
    if origin is Literal:
        return _choice(value, args, where)
    if origin in (Union, types.UnionType):
        return _one_of(value, args, where)
    if origin is tuple:
        return _tuple(value, args, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: {_shown(value)} is not a mapping")
        return {str(key): convert(item, args[1], _join(where, str(key))) for key, item in value.items()}
    return _plain(value, kind, where)


def _plain(value: Any, kind: Any, where: str) -> Any:
    """Return a bool, int, float or str; an int is a float too, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind:
        return value
    raise RecipeError(f"{where}: {_shown(value)} is not {_name(kind)}")


def _component(value: Any, where: str) -> Component:
    if isinstance(value, str):
        return Component(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise RecipeError(f"{where}: write a name, or {{name: NAME, option: value}}, not {_shown(value)}")
    return Component(value["name"], {str(key): item for key, item in value.items() if key != "name"})


def _choice(value: Any, allowed: tuple[Any, ...], where: str) -> Any:
    for candidate in allowed:
        # YAML reads 32 as a number where a recipe means the name "32"
        if value == candidate or (isinstance(candidate, str) and type(value) is int and str(value) == candidate):
            return candidate
    names = [str(a) for a in allowed]
    raise RecipeError(f"{where}: {_shown(value)} is not one of {', '.join(names)}.{did_you_mean(str(value), names)}")


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    exact = [kind for kind in kinds if kind is type(value)]
    for kind in [*exact, *kinds]:
        if kind is type(None):
            if value is None:
                return None
            continue
        try:
            return convert(value, kind, where)
        except RecipeError:
            if len([k for k in kinds if k is not type(None)]) == 1 and value is not None:
                raise
    raise RecipeError(f"{where}: {_shown(value)} is not {' or '.join(_name(kind) for kind in kinds)}")


def _tuple(value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{where}: {_shown(value)} is not a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(convert(item, kinds[0], _join(where, str(i))) for i, item in enumerate(value))
    if len(value) != len(kinds):
        raise RecipeError(f"{where}: {len(kinds)} values are needed, not {len(value)}")
    return tuple(
        convert(item, kind, _join(where, str(i))) for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _name(kind: Any) -> str:
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(kind, str(kind).replace("typing.", ""))


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
