"""What somebody else wrote, read in one way: values of the types and within the ranges that are expected.

Every value of a file, of a row, of a recipe or of the command line passes through `typed`. What does not fit
is an InputError that names where it stands, what it is, and what was expected there: nothing is guessed, and
neither true nor a text is taken for a number. `Fields` is an object whose fields are read one by one; a null
is a field that is not there.

    fields = Fields(read_json(path), f"{path}: ")
    fields.get("num_hidden_layers", int, low=1, high=1000)
    fields.get("eos_token_id", tuple[int, ...], (), low=0)

It leaves out: how text becomes JSON (files.py), and what a value means.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from gramr2.files import InputError, need

REQUIRED: Any = object()
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "an object"}
NAMES |= {list: "a list"}
BOUNDS: dict[Any, float] = {int: 2**63 - 1, float: sys.float_info.max}  # what the machine computes with


def typed(value: Any, kind: Any, where: str, **limits: Any) -> Any:
    """`value` as the type that `kind` names, and within `limits` (`_is_within`).

    `kind` may be T | None; a tuple of one type, for which a list and a single value will do; or a dict from
    texts to one type.
    """
    if kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else typed(value, inner[0], where, **limits)
    if origin is tuple:
        every = value if isinstance(value, (list, tuple)) else [value]
        return tuple(typed(each, inner[0], where, **limits) for each in every)
    plain = origin or kind
    fits = type(value) is plain or (plain is float and type(value) is int)
    if not fits or (origin is None and not _is_within(value, plain, **limits)):
        raise InputError(f"{where}: expected {_expected(plain, **limits)}, got {value!r:.60}")
    if origin is list:
        return [typed(each, inner[0], where, **limits) for each in value]
    if origin is dict:
        return {name: typed(each, inner[1], f"{where}: {name}", **limits) for name, each in value.items()}
    return float(value) if plain is float else value


def _is_within(
    value: Any, kind: Any, low: Any = None, high: Any = None, above: Any = None, below: Any = None,
    among: Any = None,
) -> bool:  # fmt: skip
    """From `low` to `high`, strictly between `above` and `below`, one of `among`; and every number finite."""
    if kind in BOUNDS and not -BOUNDS[kind] <= value <= BOUNDS[kind]:
        return False
    ends = low is None or value >= low, high is None or value <= high
    inside = above is None or value > above, below is None or value < below
    return all(ends) and all(inside) and (among is None or value in among)


def _expected(kind: Any, among: Any = None, **limits: Any) -> str:
    """A range, in words."""
    if among is not None:
        return f"one of {', '.join(map(str, among))}"
    words = {"low": "from", "above": "above", "high": "to", "below": "below"}
    ends = (f"{words[name]} {limits[name]}" for name in words if limits.get(name) is not None)
    return " ".join([NAMES[kind], *ends])


class Fields:
    """An object with named fields. `where` is what an error begins with, as "FILE: "."""

    def __init__(self, row: Any, where: str = ""):
        need(isinstance(row, dict), f"{where}not an object with named fields")
        self.row, self.where = row, where

    def get(self, name: str, kind: Any, default: Any = REQUIRED, **limits: Any) -> Any:
        """A field's value; `default` where there is none, which without a default is an error."""
        value = self.row.get(name)
        if value is None:
            need(default is not REQUIRED, f'{self.where}no field "{name}"')
            return default
        return typed(value, kind, f'{self.where}field "{name}"', **limits)

    def object(self, name: str) -> Fields:
        """A field that is an object itself; an empty one where there is none."""
        return Fields(self.get(name, dict, {}), f"{self.where}{name}: ")


@cache
def _kinds(cls: type) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Type and limits of each field of a dataclass; limits stand in its metadata."""
    kinds = typing.get_type_hints(cls)
    return {each.name: (kinds[each.name], each.metadata) for each in dataclasses.fields(cls)}


def as_dataclass(cls: Any, row: Any, where: str = "") -> Any:
    """An object with the fields of a dataclass, and no other, as one of it."""
    kinds, given = _kinds(cls), {}
    for name, value in Fields(row, f"{where}not a {cls.__name__} record: ").row.items():
        need(name in kinds, f"{where}not a {cls.__name__} record: unknown field {name!r:.40}")
        given[name] = typed(value, kinds[name][0], f'{where}field "{name}"', **kinds[name][1])
    try:
        return cls(**given)
    except TypeError as error:  # a field is missing
        raise InputError(f"{where}not a {cls.__name__} record: {error}") from None
