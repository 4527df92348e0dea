"""Every option of a data set, and what it may be: checked before anything is computed, and where data are read."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qbench.config.kinds import Kind, is_number
from qbench.errors import UserError, unknown

Option = tuple[Callable[[Any], bool], str]
PREPROCESSINGS = ("standard", "gcn_zca")
AUGMENTATIONS = ("none", "crop", "crop_flip")  # of images in memory
STREAM_AUGMENTATIONS = ("none", "resized_crop_flip")


def _whole(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _real(allowed: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and is_number(value) and allowed(value)


def _each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(map(check, value))


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _path(value: Any) -> bool:
    try:
        return isinstance(value, (str, Path)) and bool(str(value).strip()) and b"\0" not in os.fsencode(value)
    except UnicodeError:  # half a character
        return False


def _one_of(names: tuple[str, ...]) -> Option:
    return _or_null(lambda value: value in names), f"one of {', '.join(names)}, or null"


_COUNT: Option = (_whole(1, 10**9), "a positive whole number")
_COUNT_OR_NULL: Option = (_or_null(_COUNT[0]), "null or a positive whole number")
_SEED: Option = (_whole(0), "a whole number from 0")

OPTIONS: dict[str, Option] = {
    "root": (_path, "the path of a folder or zip"),
    "channels": (_or_null(_whole(1, 64)), "a positive whole number (at most 64) or null"),
    "classes": (_or_null(_whole(1, 1_000_000)), "a positive whole number (at most 1,000,000) or null"),
    "size": (_or_null(_whole(1, 4096)), "a positive whole number (at most 4096) or null"),
    "mean": (_or_null(_each(_real(lambda v: 0 <= v <= 1))), "null or a list of numbers from 0 to 1 (pixel / 255)"),
    "std": (_or_null(_each(_real(lambda v: 0 < v <= 1))), "null or a list of numbers above 0, at most 1 (pixel / 255)"),
    "preprocess": _one_of(PREPROCESSINGS),
    "augment": _one_of(tuple(dict.fromkeys((*AUGMENTATIONS, *STREAM_AUGMENTATIONS)))),
    "val": (
        lambda value: _whole(0)(value) or _real(lambda v: 0 < v < 1)(value),
        "0, a fraction in (0, 1) or a whole number of images",
    ),
    "val_seed": _SEED,
    "train_examples": _COUNT_OR_NULL,
    "test_examples": _COUNT_OR_NULL,
}
_WORKERS: Option = (_or_null(_whole(0, 256)), "null or a whole number from 0 to 256")
OWN: dict[str, dict[str, Option]] = {  # of one data set alone
    "synthetic": {  # nothing is read off images here
        "channels": (_whole(1, 64), "a positive whole number (at most 64)"),
        "classes": (_whole(1, 1_000_000), "a positive whole number (at most 1,000,000)"),
        "size": (_whole(1, 4096), "a positive whole number (at most 4096)"),
        "train_size": _COUNT,
        "test_size": _COUNT,
        "seed": _SEED,
        "noise": (_real(lambda v: v >= 0), "a number from 0"),
    },
    "svhn": {"extra": (lambda value: isinstance(value, bool), "true or false")},
    "imagenet": {"workers": _WORKERS},
    "image_stream": {"workers": _WORKERS},
}


def check(name: str, config: Mapping[str, Any]) -> None:
    """Compares each option of the data set `name` with the tables.

    Errors: UserError naming the option that is unknown or out of range, what was got and what is allowed.
    """
    own = OWN.get(name, {})
    options = OPTIONS | {"augment": _one_of(STREAM_AUGMENTATIONS if "workers" in own else AUGMENTATIONS)} | own
    for key, value in config.items():
        if key in ("name", "description"):
            continue
        if key not in options:
            raise unknown(f"option of dataset={name}", key, options)
        fits, words = options[key]
        if not fits(value):
            raise UserError(f"dataset.{key} must be {words}, got {value!r}")


# Whatever the data set is; one by its name may be narrower (`check`).
KINDS = {f"dataset.{k}": Kind(words, fits) for part in (*OWN.values(), OPTIONS) for k, (fits, words) in part.items()}
