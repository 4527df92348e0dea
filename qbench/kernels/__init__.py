"""Compiled versions of quantizers, and of batch-norm with what follows it.

Three tiers give the same values up to rounding: `cpp` (a C++ source of this package, compiled on first use and kept in
the cache folder), `compile` (the formulas of quantizers by torch.compile, the tier of GPUs) and `torch` (the reference:
no kernel at all).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from qbench.config.recipe import KERNELS
from qbench.kernels import build
from qbench.kernels.backend import Backend
from qbench.kernels.formulas import Formulas
from qbench.kernels.functions import Fast
from qbench.kernels.fuse import fuse
from qbench.quant import ops, quantizer

__all__ = ["available", "fuse", "tier", "use", "using"]
GONE = ("numba",)  # tiers of earlier versions, which folders of old runs still name
log = logging.getLogger(__name__)


@cache
def _cpp() -> Backend | str:
    """The compiled C++ kernels, or why there are none."""
    try:
        return Backend(build.library())
    except build.CannotBuild as error:
        return str(error)


def available() -> dict[str, bool]:
    """Whether each tier works here; compiles where that is the only way to know."""
    return {"cpp": isinstance(_cpp(), Backend), "torch": True}


def use(mode: str) -> str:
    """Switch all nets of this process to a tier; returns the one now in use: cpp, compile or torch.

    `auto` is cpp. In place of cpp, where it does not work, comes torch, and in place of a tier of older versions cpp;
    why is said once per process.

    Errors: ValueError on an unknown mode.
    """
    if mode in GONE:
        _say(f"kernels={mode} is no longer there, and kernels=cpp does what it did up to rounding")
        mode = "cpp"
    if mode not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {mode!r}")
    ops.compiled = Formulas(_say_slower) if mode == "compile" else None
    quantizer.formulas = mode == "compile"
    quantizer.fast = None
    if mode in ("auto", "cpp"):
        if isinstance(found := _cpp(), Backend):
            quantizer.fast = Fast(found)
            return "cpp"
        _say_slower(f"kernels=cpp is not used: {found}")
    return "compile" if mode == "compile" else "torch"


@contextmanager
def using(mode: str) -> Iterator[str]:
    """Within the block that tier is in use, which is given; then what was before."""
    before = quantizer.fast, quantizer.formulas, ops.compiled
    try:
        yield use(mode)
    finally:
        quantizer.fast, quantizer.formulas, ops.compiled = before


@cache
def _say(line: str) -> None:
    log.warning("%s", line)


def _say_slower(line: str) -> None:
    _say(f"{line}; training is slower, and otherwise the same up to rounding")


def tier() -> str:
    """The tier in use."""
    if quantizer.fast is not None:
        return "cpp"
    return "torch" if ops.compiled is None or ops.compiled.broken else "compile"
