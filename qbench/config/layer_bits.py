"""Widths of single layers, as users write them: `layer_bits={layer3.*:2,fc:8/8,@first:8/32}`. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbench import shapes
from qbench.config import bits
from qbench.errors import UserError

FORM = "layer_bits takes patterns of layers and their bits, {layer3.*:2,fc:8/8}, or a YAML file of such lines"


def read(given: Any, method: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """[{match, w, a}] of what was given, a mapping or the path of a file that holds one; None for nothing.

    w and a are widths (32: float). Where one number was said it counts for both, or for the one that there is: then
    `either` is true.
    Errors: UserError naming the pattern, what was got and what `method` allows.
    """
    if given is None:
        return None
    if isinstance(given, str):
        path = Path(given).expanduser()
        try:
            given = shapes.parsed_yaml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"layer_bits={path}: {getattr(error, 'strerror', None) or error}. {FORM}") from error
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{FORM}; got {given!r}")
    return [_entry(str(match), value, method) for match, value in given.items()]


def _entry(match: str, value: Any, method: Mapping[str, Any]) -> dict[str, Any]:
    what = f"layer_bits: '{match}'"
    if value is None or isinstance(value, (Mapping, list, bool)):
        raise UserError(f"{what}: {FORM}; got {value!r}")
    try:
        w, a = bits.parse(value)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    assert w is not None
    assert a is not None
    either = "/" not in str(value)
    if either and list(method["a_bits"].get("only", [])) == [bits.FLOAT]:
        a = bits.FLOAT
    for site, width, of in (("w_bits", w, "weights"), ("a_bits", a, "activations")):
        if width != bits.FLOAT and not bits.allows(method[site], width):
            allowed = bits.allowed_text(method[site])
            allowed += "" if "(float)" in allowed else " or 32 (float)"
            raise UserError(f"{what}: method={method['name']} takes {allowed} for {of}, got {width:g}")
    return {"match": match, "w": w, "a": a, "either": either}
