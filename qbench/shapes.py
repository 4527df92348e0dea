"""What a file's content may be: JSON and YAML that cannot cost all memory, compared with a shape. No torch here.

A shape is a type or several; {field: shape}, where "field?" may be missing; [shape] of a list; Each(shape).
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

DEPTH = 64  # how deep lists and mappings of a file may lie in each other


@dataclass(frozen=True)
class Each:
    """The shape of a mapping with any fields, whose values all have the shape `of`."""

    of: Any


NUMBER = (int, float)
OPEN = (int, float, type(None))
NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}
NAMES |= {list: "a list", type(None): "null"}


def check(value: Any, shape: Any, place: str = "") -> None:
    """Compare parsed JSON with a shape. Errors: ValueError naming the field."""
    kind: Any = dict if isinstance(shape, dict | Each) else list if isinstance(shape, list) else shape
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(NAMES.get(k, f"a {k.__name__}") for k in kinds if k is not int or float not in kinds)
        raise ValueError(f"{place or 'it'} must be {names}, got {json.dumps(value, default=str)[:40]}")
    inner: Iterable[tuple[Any, Any, Any]] = ()
    if isinstance(shape, dict):
        missing = [k for k in shape if not k.endswith("?") and k not in value]
        if missing:
            raise ValueError(f"{place or 'it'} has no '{missing[0]}'")
        inner = ((n, value[n], s) for k, s in shape.items() if (n := k.rstrip("?")) in value)
    elif isinstance(shape, Each):
        inner = ((k, v, shape.of) for k, v in dict(value).items())
    elif isinstance(shape, list):
        inner = ((i, v, shape[0]) for i, v in enumerate(value))
    for name, part, its in inner:
        check(part, its, f"{place}.{name}" if place else str(name))


def parsed(text: str) -> Any:
    """The JSON in `text`; numbers are finite. Errors: ValueError."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number")

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            refuse(word)
        return value

    def whole(word: str) -> int:
        number(word)  # what no float can hold is nobody's count, and fails where it is written out
        return int(word)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number, parse_int=whole)
    except RecursionError as error:
        raise ValueError("lists or mappings lie too deep in each other") from error


def parsed_yaml(text: str, aliases: bool = False) -> Any:
    """The YAML in `text`, no deeper than DEPTH and without `aliases`: both can cost all memory. Errors: ValueError."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > DEPTH:
            raise ValueError(f"brackets lie more than {DEPTH} deep in each other")
    loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    try:
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH or (isinstance(event, yaml.AliasEvent) and not aliases):
                raise ValueError(f"it has an alias, or is nested more than {DEPTH} deep")
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
