"""Parsed data sets, kept as one file of uint8 tensors each: parsed once, by one process, and shared by all.

The file is mapped into memory, not read: processes at work side by side have one copy of the images between them.
"""

import hashlib
import io
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qbench import files
from qbench.data.splits import Split
from qbench.errors import UserError
from qbench.files import atomic_write, cache_folder

log = logging.getLogger(__name__)
Splits = tuple[Split, Split]
FORMAT = 3  # part of every key: raise it when the meaning of a file changes


def fingerprint(root: Path, names: Iterable[str] = ("",)) -> list[Any]:
    """The resolved `root` and, of each file below it, [name, size, modification time]: changed by every ordinary edit.

    Errors: UserError when a file is not there, or is a pipe or the like.
    """
    try:
        stats = [(name, os.stat(os.path.join(root, name) if name else root)) for name in names]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; set dataset.root to where the data lies"
        ) from error
    if strange := next((name for name, found in stats if not stat.S_ISREG(found.st_mode)), None):
        raise UserError(f"{root / strange} is not an ordinary file; set dataset.root to where the data lie")
    return [os.path.realpath(root), *([name, found.st_size, found.st_mtime_ns] for name, found in stats)]


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds `path`.lock against other processes; yields False, after a warning, where its folder cannot be written."""
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.locked(f"{path}.lock", lambda: log.info("waiting for %s.lock", path)))
            writable = True
        except OSError as error:
            message = "the cache folder %s cannot be used (%s); set QBENCH_CACHE to a writable folder"
            log.warning(message, path.parent, error)
            writable = False
        yield writable


def cached(name: str, key: Any, parse: Callable[[], Splits]) -> Splits:
    """The (train, test) of `parse()`, in canonical order; from the cache where `key` (JSON values) was parsed before.

    A damaged cache file is named in a warning and rebuilt. One process parses while others wait. A cache folder that
    cannot be written costs a warning and a parse on each load.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, key]).encode()).hexdigest()
    path = cache_folder() / f"{name}-{digest[:16]}.tensors"
    if (found := _read(path)) is not None:
        return found
    with locked(path) as writable:
        if (found := _read(path, warn=False)) is not None:
            return found
        train, test = (canonical(split) for split in parse())
        if writable:
            try:
                atomic_write(path, _pack(train, test))
            except UserError as error:
                log.warning("the parsed data set is not kept: %s", error)
    return train, test


def canonical(split: Split) -> Split:
    """The split in the order of the SHA-256 of (label, pixels) of its images.

    A folder, a zip and the original batches hold the same images in different orders. Sorted by content they are the
    same tensors, so that checksums agree and a seed draws the same batches from each. A hash rather than the pixels or
    the label, so that neighbours have nothing in common and every part of the split is a fair sample.
    """
    pairs = zip(split.labels.tolist(), split.images.numpy(), strict=True)
    keys = [hashlib.sha256(b"%d " % label + image.tobytes()).digest() for label, image in pairs]
    return split.take(torch.tensor(sorted(range(len(keys)), key=keys.__getitem__)))


def _pack(train: Split, test: Split) -> bytes:
    """The digests of both splits in hex, then images [N, H, W, C] and labels of each in NumPy's format."""
    file = io.BytesIO()
    file.write((train.digest + test.digest).encode())
    for split in (train, test):
        np.save(file, split.images.permute(0, 2, 3, 1).contiguous().numpy())  # as the batches want them
        np.save(file, split.labels.numpy())
    return file.getvalue()


def _read(path: Path, warn: bool = True) -> Splits | None:
    """The splits in `path`, or None where it is missing or does not match its own digests."""
    try:
        with path.open("rb") as file:
            digests = file.read(128).decode()
            train, test = (
                Split(_mapped(file, np.uint8).permute(0, 3, 1, 2), _mapped(file, np.int64)) for _ in range(2)
            )
        if train.digest + test.digest == digests:
            return train, test
        reason = "its checksum does not match"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever a damaged file makes NumPy and PyTorch raise
        reason = str(error)
    if warn:
        log.warning("the cached data set %s is damaged (%s): ignored and built again", path, reason)
    return None


def _mapped(file: BinaryIO, dtype: Any) -> Tensor:
    """The array at the file's position, mapped copy-on-write; the position moves behind it."""
    np.lib.format.read_magic(file)
    shape, _, _ = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    array = np.memmap(file, dtype, "c", start, shape)
    file.seek(start + array.nbytes)
    return torch.from_numpy(array)
