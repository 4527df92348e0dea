"""How a compiled kernel is called: one block of 64-bit words, on the threads that torch itself uses."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

POINTERS = (
    *("x", "r", "gy", "gq", "y", "q", "dx", "dr", "sums", "coefficients"),
    *("weight", "bias", "running_mean", "running_var", "dchannels", "dscalars"),
)
WORDS = ("thread", "threads", "bf16", "n", "channels", "inner", "chunks", "activation", "kind", "norm", *POINTERS)
NUMBERS = ("value", "steps", "lo", "hi", "zero", "closed")  # of a qbench.quant.quantizer.Kernel
DOUBLES = ("eps", "momentum", *(f"first_{n}" for n in NUMBERS), *(f"second_{n}" for n in NUMBERS))
ACTIVATIONS = ("bounded", "relu", "clip", "prelu")  # as `Activation` in fused.cpp
KINDS = ("none", "learned", "grid", "sign", "polynomial", "tanh", "fourier")  # as `Kind` there
ENTRIES = ("stats_part", "stats_end", "forward_part", "reduce_part", "reduce_end", "apply_part")
ROWS = ("a", "b", "mean", "inverse", "kg", "kx", "k1", "beta", "zeta", "shift")  # of the coefficients, by channel
SUMS = ("dz", "dzx", "dshift", "dbeta", "dzeta")  # what the backward pass adds up by channel
SMALL = 1 << 15  # values below which one thread is faster than two
CHUNKS = 64  # at most; sums are taken per chunk, whatever the number of threads


class Args(ctypes.Structure):
    """The block; the order is that of `Args` in fused.cpp."""

    _fields_ = [*((w, ctypes.c_int64) for w in WORDS), *((d, ctypes.c_double) for d in DOUBLES)]


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded (a second one would fight with it for the cores), where it is GNU's."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and ".so" in line}
    except OSError:
        return None
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


def _address(function: Any) -> int:
    """Where a C function lies."""
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


_INT = ctypes.CFUNCTYPE(ctypes.c_int)
_zero, _one = _INT(lambda: 0), _INT(lambda: 1)  # one thread, where there is no OpenMP


class Backend:
    """Six functions of a compiled library and the threads they run on.

    Args:
        library: as `build.library` gives it
        level: the instruction set, of build.LEVELS; None: the best that this processor has
    """

    def __init__(self, library: ctypes.CDLL, level: str | None = None) -> None:
        library.level.restype = ctypes.c_char_p
        self.level = level or str(library.level().decode())
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self.entries = {entry: kind((f"{entry}_{self.level}", library)) for entry in ENTRIES}
        openmp = _openmp()
        self.thread, self.threads = _address(_zero), _address(_one)
        self.parallel: Any = None
        if openmp is not None:
            self.thread, self.threads = _address(openmp.omp_get_thread_num), _address(openmp.omp_get_num_threads)
            self.parallel = openmp.GOMP_parallel
            self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            self.parallel.restype = None

    def args(self, x: Tensor, channels: int, inner: int) -> Args:
        """A block for `x`, seen as rows of `channels` (inner = 1) or as planes of `inner` values."""
        n = x.numel()
        rows = n // (channels * inner)
        chunks = max(1, min(CHUNKS, rows, n >> 13))
        return Args(
            thread=self.thread,
            threads=self.threads,
            bf16=x.dtype == torch.bfloat16,
            n=n,
            channels=channels,
            inner=inner,
            chunks=chunks,
            x=x.data_ptr(),
        )

    def run(self, entry: str, args: Args) -> None:
        """Call an entry: on all threads where its name ends in _part and there is enough to do."""
        function = self.entries[entry]
        if self.parallel is None or entry.endswith("_end"):
            function(ctypes.byref(args))
            return
        count = torch.get_num_threads() if args.n > SMALL else 1
        self.parallel(function, ctypes.byref(args), count, 0)
