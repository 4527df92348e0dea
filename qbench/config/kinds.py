"""What the value of an option may be, and the words in which a wrong one is refused. No torch here."""

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.errors import UserError, nearest, unknown

LONGEST = 150  # bytes of a name: what is put before and behind it must fit into the 255 of a file system


@dataclass(frozen=True)
class Kind:
    """Values for which `allows` holds, `allowed` in words; null where `null`; instead of them one of `words`."""

    allowed: str
    allows: Callable[[Any], bool]
    null: bool = False
    words: tuple[str | bool, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Errors: UserError naming the option, what was got and what is allowed."""
        if (value is None and self.null) or any(value is w or (value == w and type(value) is str) for w in self.words):
            return
        if self.allows(value):
            return
        told = [w if isinstance(w, str) else str(w).lower() for w in self.words]
        if not self.allowed:
            raise unknown(name, str(value), told)
        raise UserError(f"{name} must be {' or '.join([self.allowed, *told])}, got {value!r}")


def number(
    lo: float = -math.inf,
    hi: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    whole: bool = False,
    **more: Any,
) -> Kind:
    """Finite numbers of at least `lo` (with `above`: above it) and at most `hi` (with `below`: below it)."""

    def allows(x: Any) -> bool:
        inside = is_number(x) and (x > lo if above else x >= lo) and (x < hi if below else x <= hi)
        return inside and (not whole or x == int(x))

    what = "a whole number" if whole else "a number"
    if math.isfinite(hi):
        what += f" in {lo:g}..{hi:g}" + (f", {hi:g} excluded" if below else "")
    elif math.isfinite(lo):
        what += f" above {lo:g}" if above else f" of at least {lo:g}"
    return Kind(what, allows, **more)


def whole(lo: float, hi: float = math.inf, **more: Any) -> Kind:
    """Whole numbers, 3.0 not among them."""
    kind = number(lo, hi, whole=True)
    return Kind(kind.allowed, lambda x: isinstance(x, int) and kind.allows(x), **more)


def truth(**more: Any) -> Kind:
    """true or false."""
    return Kind("true or false", lambda x: isinstance(x, bool), **more)


def one_of(*words: str | bool, **more: Any) -> Kind:
    """One of `words`; a wrong one is answered with the nearest."""
    return Kind("", lambda x: False, words=words, **more)


def numbers(allowed: str, allows: Callable[[list[float]], bool] = lambda xs: True, **more: Any) -> Kind:
    """A list of numbers for which `allows` holds."""
    return Kind(
        allowed, lambda xs: isinstance(xs, (list, tuple)) and all(map(is_number, xs)) and allows(list(xs)), **more
    )


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= sys.float_info.max


def _writable(text: Any) -> bool:
    """Text that a file can hold: no bytes that are not UTF-8, nothing that is not printed."""
    return isinstance(text, str) and text.strip() != "" and not re.search("[\x00-\x1f\ud800-\udfff]", text)


PATH = Kind("a path in printable letters (UTF-8)", _writable)


def _is_name(text: Any) -> bool:
    plain = _writable(text) and not re.search(r"[/\\]", text) and not text.startswith(".")
    return plain and len(os.fsencode(text)) <= LONGEST


NAME = Kind(
    f"a name for a folder, of at most {LONGEST} bytes, without / and \\ and no dot in front", _is_name, null=True
)


class Start(Kind):
    """What a run starts from: scratch, float, or a file or run folder that is there."""

    def check(self, name: str, value: Any) -> None:
        if value in (None, *self.words):
            return
        if not _writable(value) or not Path(value).exists():
            hint = nearest(str(value), map(str, self.words))
            raise UserError(
                f"{name}={value}: neither 'scratch' nor 'float' nor a checkpoint file or run folder that is there."
                + (f" Did you mean '{hint}'?" if hint else "")
            )


START = Start("", lambda x: False, null=True, words=("scratch", "float"))


def seconds(text: Any) -> float | None:
    """90, '90', '90s', '8m', '1.5h' or '2d' in seconds; None where it is nothing of that kind, or not above 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(text))
    value = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    return value if value > 0 and not isinstance(text, bool) else None


TIME = Kind("a time such as 90s, 8m, 1.5h or 2d", lambda x: seconds(x) is not None, null=True)
