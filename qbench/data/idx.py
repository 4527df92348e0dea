"""MNIST's files: arrays of bytes behind a header of their shape, packed or not."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np

LARGEST = 1 << 31  # bytes


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of bytes, `path` or `path`.gz: 0, 0, 8, its dimensions, the sizes of these, the bytes.

    Errors: ValueError where the file does not hold what it says; OSError, EOFError or zlib.error of a damaged one.
    """
    packed = path.with_name(path.name + ".gz")
    with path.open("rb") if path.is_file() else gzip.open(packed, "rb") as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not magic[3]:
            raise ValueError(f"{file.name} does not begin as an IDX file of bytes")
        header = file.read(4 * magic[3])
        shape = struct.unpack(f">{len(header) // 4}I", header[: len(header) // 4 * 4])
        expected = math.prod(shape)
        content = file.read(min(expected, LARGEST) + 1)
        if len(shape) < magic[3] or len(content) != expected:
            raise ValueError(f"{file.name} should hold {' x '.join(map(str, shape))} bytes after its header")
        return np.frombuffer(content, np.uint8).reshape(shape).copy()
