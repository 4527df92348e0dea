"""The formats in which ptq stores weights, as words. No torch here."""

from collections.abc import Mapping
from typing import Any

BITS = {"fp16": 16, "e4m3": 8, "e5m2": 8}


def check(options: Mapping[str, Any], w_bits: float) -> None:
    """ValueError on an unknown w_format, or weights of other bits than its own."""
    word = options["w_format"]
    if word != "integer" and word not in BITS:
        raise ValueError(f"w_format must be one of integer, {', '.join(BITS)}, got {word!r}")
    if word != "integer" and w_bits not in (BITS[word], 32):
        raise ValueError(f"weights stored as {word} have {BITS[word]} bits: w_bits={BITS[word]}, got {w_bits:g}")
