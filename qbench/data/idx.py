"""MNIST's files: arrays of bytes behind a header of their shape, packed or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np

LARGEST = 1 << 31  # bytes


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of bytes, `path` or `path`.gz: 0, 0, 8, its dimensions, the sizes of these, the bytes.

    Errors: ValueError naming the file where it does not hold what it says, or is damaged.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        return _read(path, path.open("rb")) if path.is_file() else _read(packed, gzip.open(packed, "rb"))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path if path.is_file() else packed}: {error}") from error


def _read(path: Path, opened: IO[bytes] | gzip.GzipFile) -> np.ndarray:
    with opened as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not magic[3]:
            raise ValueError(f"{path} does not begin as an IDX file of bytes")
        header = file.read(4 * magic[3])
        shape = struct.unpack(f">{len(header) // 4}I", header[: len(header) // 4 * 4])
        expected = math.prod(shape)
        content = file.read(min(expected, LARGEST) + 1)
        if len(shape) < magic[3] or len(content) != expected:
            raise ValueError(f"{path} should hold {' x '.join(map(str, shape))} bytes after its header")
        return np.frombuffer(content, np.uint8).reshape(shape).copy()
