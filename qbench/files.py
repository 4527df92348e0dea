"""Files that are whole or absent: written under a temporary name, then renamed. Locks, and where a cache may lie."""

import hashlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from qbench.errors import UserError

try:
    import fcntl
except ImportError:  # a system without flock
    fcntl = None  # type: ignore[assignment]

POLL = 0.1  # seconds between two looks at a lock that another holds
BEAT = 5.0  # seconds between two signs of life of a lock that the system does not keep
SILENT = 60.0  # seconds without one, after which its holder is taken for dead
TEMPORARY = ".qbench-part"  # how the name of a file that is being written ends


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, never a part.

    Errors: UserError naming the path when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Choose another folder with out=DIR.") from error
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}. What was there before is untouched.") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def remove_parts(folder: Path) -> None:
    """Remove what `atomic_write` was writing in `folder` when it was killed, and nothing else."""
    for path in folder.glob(f".*{TEMPORARY}"):
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """`QBENCH_CACHE`, or ~/.cache/qbench; without a home a folder among the temporary ones, for this user alone.

    Errors: UserError where that one is another's.
    """
    if chosen := os.environ.get("QBENCH_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "qbench"
    except RuntimeError:
        place = Path(tempfile.gettempdir()) / f"qbench-{os.getuid()}"
    with suppress(OSError):
        place.mkdir(mode=0o700)
    if not place.exists() or place.is_symlink() or place.stat().st_uid != os.getuid():
        raise UserError(f"there is no home folder, and {place} cannot be used; set QBENCH_CACHE to a folder of yours")
    return place


@contextmanager
def locked(path: str | os.PathLike[str], waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Holds the lock file `path` against other processes and threads; `waiting` is called once where another holds it.

    The system's own lock (flock) where there is one: it goes with its holder, however that ends, and the empty file
    stays. Elsewhere (some network folders) a file `path`.lease that its holder touches every BEAT seconds; one that
    stood untouched for SILENT seconds, by the clock of who waits, was left by a holder that died, on whatever host.

    Errors: OSError where the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    take: Callable[[], bool] = partial(_flock, descriptor)
    release: Callable[[], None] = partial(_unlock, descriptor)
    try:
        try:
            taken = take()
        except OSError:  # ENOSYS, ENOTSUP, ENOLCK, ...: not to be had here
            lease = _Lease(Path(f"{os.fspath(path)}.lease"))
            take, release = lease.take, lease.release
            taken = take()
        if not taken:
            waiting()
            while not take():
                time.sleep(POLL)
        try:
            yield
        finally:
            release()
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    if fcntl is None:
        raise OSError("no flock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # held by another
        return False
    return True


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked child has the descriptor too


class _Lease:
    """A lock that is held while its file exists and changes."""

    def __init__(self, path: Path) -> None:
        self.path, self.token, self.over = path, uuid.uuid4().hex, threading.Event()
        self.seen: tuple[int, int] | None = None  # the file as it stood when it last changed, and since when
        self.since = 0.0

    def take(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self.token)
        except FileExistsError:
            self._break_silent()
            return False
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        self.over.set()
        if self._mine():
            self.path.unlink(missing_ok=True)

    def _mine(self) -> bool:
        """Whether nobody took this holder for dead."""
        with suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace") == self.token
        return False

    def _beat(self) -> None:
        while not self.over.wait(BEAT) and self._mine():
            with suppress(OSError):
                os.utime(self.path)

    def _state(self, path: Path) -> tuple[int, int] | None:
        with suppress(OSError):
            stat = path.stat()
            return stat.st_ino, stat.st_mtime_ns
        return None

    def _break_silent(self) -> None:
        state = self._state(self.path)
        if state is None or state != self.seen:
            self.seen, self.since = state, time.monotonic()
        elif time.monotonic() - self.since > SILENT:
            aside = Path(f"{self.path}.{self.token}")
            with suppress(OSError):
                self.path.rename(aside)  # of several who wait, one has it
                if self._state(aside) != self.seen:  # another broke it a moment ago and holds it by now: give it back
                    os.link(aside, self.path)
            aside.unlink(missing_ok=True)
