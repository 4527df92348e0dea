"""Files that are whole or absent: written under a temporary name, then renamed."""

import hashlib
import os
import tempfile
from pathlib import Path

from qbench.errors import UserError

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
