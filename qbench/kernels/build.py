"""The C++ source of this package, compiled by the user's own compiler and kept in the cache folder."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qbench.errors import UserError
from qbench.files import cache_folder, locked, sha256_file

SOURCE = Path(__file__).with_name("fused.cpp")
# -ffp-contract=off: a product is rounded before it is added, on every instruction set, so that all give the same bits
# -O3: below it gcc leaves short inner loops rolled up, and makes no vectors of what holds one (tanh)
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=off")  # fmt: skip
# What the source is compiled for, the least first: of an inline function of the standard library that several objects
# hold the linker keeps the first, which all processors can run. fused.cpp asks the processor for just these.
LEVELS: dict[str, tuple[str, ...]] = {"plain": ("-DBASE",)}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": ("-mavx2",), "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}
SECONDS = 600
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


def _key(command: list[str]) -> str:
    version = subprocess.run(
        [*command, "--version"], capture_output=True, encoding="utf-8", errors="replace", timeout=60
    ).stdout
    parts = [
        SOURCE.read_text(encoding="utf-8"),
        version,
        *command,
        *FLAGS,
        repr(LEVELS),
        platform.system(),
        platform.machine(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _own_folder() -> Path:
    """The part of `folder` that is this user's alone.

    Errors: CannotBuild where someone else could write to it.
    """
    if not hasattr(os, "geteuid"):
        raise CannotBuild(f"nothing is compiled on {platform.system()}")
    place = folder() / f"user-{os.geteuid()}"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(place)
    return place


def _check_owner(path: Path) -> None:
    """Refuse what another user may have put or changed there: loading a library runs it.

    Errors: CannotBuild.
    """
    found = path.lstat()
    why = "it belongs to another user" if found.st_uid != os.geteuid() else ""
    why = why or ("it is a symbolic link" if stat.S_ISLNK(found.st_mode) else "")
    why = why or ("other users may write to it" if found.st_mode & 0o022 else "")
    if why:
        raise CannotBuild(f"{path} is not trusted, as {why}; remove it, or set QBENCH_KERNELS to a folder of your own")


def _kept(place: Path, key: str) -> Path | None:
    """The library that was built before, where it is as it was built: its name holds the hash of what is in it.

    Errors: CannotBuild where another user may have put it there.
    """
    for path in sorted(place.glob(f"fused-{key}-*.so")):
        _check_owner(path)
        if path.stem.endswith(f"-{sha256_file(path)}"):
            return path
    return None


def _compile(command: list[str], place: Path, key: str) -> Path:
    """Build the library in `place`, by a temporary name.

    Errors: CannotBuild with the compiler's first error.
    """
    with tempfile.TemporaryDirectory(dir=place) as temporary, ThreadPoolExecutor() as pool:
        objects = {level: f"{temporary}/{level}.o" for level in LEVELS}
        lines = [
            [*command, *FLAGS, f"-DLEVEL={level}", *LEVELS[level], "-c", str(SOURCE), "-o", name]
            for level, name in objects.items()
        ]
        list(pool.map(_run, lines))
        made = Path(temporary) / "fused.so"
        _run([*command, "-shared", *objects.values(), "-o", str(made)])
        made.chmod(0o700)
        target = place / f"fused-{key}-{sha256_file(made)}.so"
        os.replace(made, target)
    return target


def _run(words: Iterable[str]) -> None:
    words = list(words)
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise CannotBuild(f"{words[0]} failed: {said}")


def library() -> ctypes.CDLL:
    """The compiled kernels, built once for this compiler and source, and anew where the file was damaged.

    Errors: CannotBuild.
    """
    try:
        command, place = compiler(), _own_folder()
        key = _key(command)
        if (found := _kept(place, key)) is None:
            with locked(place / f"fused-{key}.lock"):
                if (found := _kept(place, key)) is None:
                    for damaged in place.glob(f"fused-{key}-*.so"):
                        damaged.unlink()
                    log.warning("compiling the kernels with %s: once on this machine, some 30 s", command[0])
                    found = _compile(command, place, key)
        return ctypes.CDLL(str(found))
    except (OSError, UserError, subprocess.SubprocessError) as error:
        raise CannotBuild(str(error)) from error
