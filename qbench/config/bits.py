"""Bit-widths as users write them (`bits=4`, `bits=4/8`, `bits=0.8`) and what a method's YAML allows. No torch here."""

import math
from collections.abc import Mapping
from typing import Any

from qbench.errors import UserError

FLOAT = 32  # a width of 32 means: left in floating point


def parse(bits: Any) -> tuple[float | None, float | None]:
    """'4' -> (4, 4), '4/8' -> (4, 8), None -> (None, None): weight bits, activation bits."""
    if bits is None:
        return None, None
    parts = str(bits).split("/")
    if len(parts) > 2:
        raise UserError(f"bits must look like 4 or 4/8 (weights/activations), got '{bits}'")
    numbers = [number("bits", part) for part in parts]
    return numbers[0], numbers[-1]


def number(name: str, value: Any) -> float:
    """`value` as a positive number, whole ones as int."""
    try:
        x = float("true" if isinstance(value, bool) else value)
    except (OverflowError, TypeError, ValueError):
        raise UserError(f"{name} must be a number such as 4 or 0.8, got '{value}'") from None
    if not math.isfinite(x) or x <= 0:
        raise UserError(f"{name} must be above 0 (32 means float), got {value}")
    return int(x) if x == int(x) else x


def allows(spec: Mapping[str, Any], bits: float) -> bool:
    """Whether `bits` is one of the widths that a method's w_bits / a_bits declares."""
    if "only" in spec:
        return bits in spec["only"]
    if bits == FLOAT and spec.get("float"):
        return True
    whole = bool(spec.get("fractional")) or bits == int(bits)
    return whole and float(spec["lo"]) <= bits <= float(spec["hi"])


def allowed_text(spec: Mapping[str, Any]) -> str:
    """The allowed widths in words."""
    if "only" in spec:
        return " or ".join(f"{b} (float)" if b == FLOAT else str(b) for b in spec["only"])
    kind = "a number" if spec.get("fractional") else "a whole number"
    return f"{kind} in {spec['lo']}..{spec['hi']}" + (" or 32 (float)" if spec.get("float") else "")


def resolve(method: Mapping[str, Any], bits: Any, w_bits: Any, a_bits: Any) -> tuple[float, float]:
    """The (weight, activation) bits of a run, checked against what the method allows.

    `bits=` sets weights, and activations too where the method quantizes them; w_bits / a_bits win over it.
    """
    w, a = parse(bits)
    slashed = "/" in str(bits)
    w = number("w_bits", w_bits) if w_bits is not None else w
    if a_bits is not None:
        a, slashed = number("a_bits", a_bits), True
    out = []
    for site, value, spec, asked in (("w", w, method["w_bits"], True), ("a", a, method["a_bits"], slashed)):
        if value is None or (not asked and list(spec.get("only", [])) == [FLOAT]):
            value = number(f"the default {site}_bits of method={method['name']}", spec["default"])
        if not allows(spec, value):
            what = "weights" if site == "w" else "activations"
            raise UserError(
                f"method={method['name']} takes {site}_bits of {allowed_text(spec)} for {what}, got {value:g}. "
                "(bits=4 sets both, bits=4/8 sets weights/activations, w_bits= and a_bits= set one.)"
            )
        out.append(value)
    return out[0], out[1]
