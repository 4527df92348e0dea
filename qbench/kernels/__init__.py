"""Compiled versions of quantizers, and of batch-norm with what follows it.

Four tiers give the same values up to rounding: `cpp` (a C++ source of this package, compiled on first use and kept in
the cache folder), `numba` (the same loops without a C++ compiler), `compile` (the formulas of quantizers by
torch.compile, the tier of GPUs) and `torch` (the reference: no kernel at all).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from qbench.config.recipe import KERNELS
from qbench.kernels import build
from qbench.kernels.backend import ENTRIES, Backend, address, openmp_threads
from qbench.kernels.formulas import Formulas
from qbench.kernels.functions import Fast
from qbench.kernels.fuse import fuse
from qbench.quant import ops, quantizer

__all__ = ["available", "fuse", "tier", "use", "using"]
log = logging.getLogger(__name__)


@cache
def _cpp() -> Backend | str:
    """The compiled C++ kernels, or why there are none."""
    try:
        library = build.library()
    except build.CannotBuild as error:
        return str(error)
    return Backend("cpp", {entry: address(getattr(library, entry)) for entry in ENTRIES}, library)


@cache
def _numba() -> Backend | str:
    """The kernels that numba compiles, or why there are none."""
    try:
        loops = build.loops(*openmp_threads())
    except build.CannotBuild as error:
        return str(error)
    return Backend("numba", {entry: getattr(loops, entry).address for entry in ENTRIES}, loops)


def available() -> dict[str, bool]:
    """Whether each tier works here; compiles where that is the only way to know."""
    return {"cpp": isinstance(_cpp(), Backend), "numba": isinstance(_numba(), Backend), "torch": True}


def use(mode: str) -> str:
    """Switch all nets of this process to a tier; returns the one now in use: cpp, numba, compile or torch.

    `auto` takes the first that works. In place of one that was asked for and does not work comes the next; why is said
    once per process.

    Errors: ValueError on an unknown mode.
    """
    if mode not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {mode!r}")
    ops.compiled = Formulas(_say) if mode == "compile" else None
    quantizer.formulas = mode == "compile"
    if mode == "compile":
        quantizer.fast = None
        return "compile"
    order = {"auto": ("cpp", "numba"), "cpp": ("cpp", "numba"), "numba": ("numba",), "torch": ()}[mode]
    for name in order:
        found = _cpp() if name == "cpp" else _numba()
        if isinstance(found, Backend):
            quantizer.fast = Fast(found)
            return name
        _say(f"kernels={name} is not used: {found}")
    quantizer.fast = None
    return "torch"


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
    log.warning("%s; training is slower, and otherwise the same", line)


def tier() -> str:
    """The tier in use."""
    if quantizer.fast is not None:
        return str(quantizer.fast.backend.name)
    return "torch" if ops.compiled is None or ops.compiled.broken else "compile"
