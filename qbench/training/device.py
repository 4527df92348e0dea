"""Where and with how many threads a run computes."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import torch

from qbench.errors import UserError


def pick(device: str) -> torch.device:
    """The device that `device=auto|cpu|cuda` means here.

    Errors: UserError when a GPU was asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got '{device}'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device=cuda, but torch sees no GPU (driver missing, or a CPU build of torch). "
            "Use device=cpu or device=auto."
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def cpu() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8", errors="replace"))
        if info.is_file()
        else None
    )
    return found[1] if found else platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(asked: int | None) -> int:
    """How many CPU threads `threads=` means; None: OMP_NUM_THREADS if set (a parallel sweep sets 1), else every core.

    Errors: UserError where it is no whole number of at least 1.
    """
    if asked is not None and (not isinstance(asked, int) or asked < 1):
        raise UserError(f"threads must be a whole number of at least 1, got {asked!r}")
    known = os.environ.get("OMP_NUM_THREADS", "")
    return asked or (int(known) if known.isdigit() else 0) or cores()


def set_threads(asked: int | None) -> int:
    """Compute with so many threads as `threads` says."""
    torch.set_num_threads(threads(asked))
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of giving them back to the kernel.

    A training step frees and takes the same 8 MB tensors again and again; by default each of them is mapped and
    unmapped, page by page. The price: the process does not shrink before it ends. Only where the C library is glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version")):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
    libc.mallopt(top_pad, 256 << 20)
