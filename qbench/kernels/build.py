"""The C++ source of this package, compiled by the user's own compiler and kept in the cache folder."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from qbench.errors import UserError
from qbench.files import cache_folder, locked

SOURCE = Path(__file__).with_name("fused.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
NATIVE = ("-march=native", "-mcpu=native", "")  # the first that the compiler takes; x86-64, Arm, neither
SECONDS = 300
log = logging.getLogger(__name__)


class CannotBuild(Exception):
    """Why there is no compiled kernel; one line."""


def folder() -> Path:
    """Where compiled kernels lie: `QBENCH_KERNELS`, or `kernels` in the cache folder."""
    own = os.environ.get("QBENCH_KERNELS")
    return Path(own) if own else cache_folder() / "kernels"


def compiler() -> list[str]:
    """The command of the C++ compiler: `CXX`, else c++, g++ or clang++.

    Errors: CannotBuild where there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"no C++ compiler found ({asked[0] if asked else 'c++, g++, clang++'})")


def _processor() -> str:
    """What -march=native depends on: the processor's name and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return " ".join(sorted({line for line in lines if line.startswith(wanted)}))


def _key(command: list[str]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = [SOURCE.read_text(), version, *command, *FLAGS, _processor(), platform.system(), platform.machine()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], target: Path) -> None:
    """Write `target`, by a temporary name.

    Errors: CannotBuild with the compiler's first error.
    """
    said = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        made = Path(place) / target.name
        for native in NATIVE:
            words = [*command, *FLAGS, *([native] if native else []), str(SOURCE), "-o", str(made)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode == 0:
                os.replace(made, target)
                return
            said = said or next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
    raise CannotBuild(f"{command[0]} failed: {said}")


def library() -> ctypes.CDLL:
    """The compiled kernels, built once for this compiler, processor and source.

    Errors: CannotBuild.
    """
    try:
        command = compiler()
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        target = place / f"fused-{_key(command)}.so"
        if not target.is_file():
            with locked(f"{target}.lock"):
                if not target.is_file():
                    log.warning("compiling the kernels with %s: once on this machine, some 10 s", command[0])
                    _compile(command, target)
        return ctypes.CDLL(str(target))
    except (OSError, UserError, subprocess.SubprocessError) as error:
        raise CannotBuild(str(error)) from error


def loops(thread: int, threads: int) -> Any:
    """The module of numba's loops; `thread`, `threads`: addresses of the C functions that they ask.

    Errors: CannotBuild where numba is not installed or cannot compile them.
    """
    try:
        import llvmlite.binding as llvm
        import numba
    except ImportError as error:
        raise CannotBuild(f"numba cannot be imported ({error}); pip install numba") from error
    llvm.add_symbol("qbench_thread", thread)
    llvm.add_symbol("qbench_threads", threads)
    # numba looks at the date of one file, and not of those whose functions it takes in
    sources = b"".join(SOURCE.with_name(name).read_bytes() for name in ("backend.py", "blocks.py", "loops.py"))
    place = folder() / f"numba-{hashlib.sha256(sources).hexdigest()[:16]}"
    numba.config.CACHE_DIR = str(place)  # type: ignore[attr-defined]
    try:
        from qbench.kernels import loops as compiled
    except (numba.core.errors.NumbaError, OSError, RuntimeError) as error:
        raise CannotBuild(f"numba cannot compile the kernels: {str(error).splitlines()[0]}") from error
    return compiled
