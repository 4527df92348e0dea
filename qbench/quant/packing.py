"""Integers of any width as bytes, and back. Nothing here knows what the integers mean."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WIDEST = 32
AT_ONCE = 2**20  # integers, a multiple of 8 so that each lot begins at a byte; a lot takes at most 32 bytes for each


def pack(codes: Tensor, widths: int | Tensor) -> bytes:
    """Unsigned integers, each in as many bits as its width says, one behind the other, least significant bit first.

    The integers are taken in C order (last axis fastest). Number i takes the bits p_i .. p_i + w_i - 1 of the stream,
    where p_i is the sum of the widths before it; bit k of the number is bit p_i + k of the stream, and bit p of the
    stream is bit p % 8 (0: the lowest, worth 1) of byte p // 8. The last byte is filled up with zeros. Nothing else is
    stored: no lengths, no widths. As an example, [1, 2, 3] of 3 bits each is 0b011_010_001, that is the bytes D1 00.

    codes: any shape, any integer dtype. widths: one number in 1..32, or a tensor of such that broadcasts to the shape
    of `codes` (a width per channel or group). The length is ceil(sum of widths / 8).

    Errors: ValueError on a width outside 1..32, widths that do not broadcast, a code below 0 or of more bits than its
    width.
    """
    numbers = codes.detach().cpu().contiguous().numpy().reshape(-1)
    if numbers.dtype.kind not in "iub":
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    each = _widths(widths, tuple(codes.shape))
    found = []
    for lot, width in _lots(numbers.size, each):
        now, word = numbers[lot], _word(width)
        _check_fit(now, width)
        rows = np.unpackbits(now.astype(word).view(np.uint8), bitorder="little").reshape(len(now), -1)
        found.append((rows[:, :width] if isinstance(width, int) else rows[_inside(width, rows)]).reshape(-1))
    if isinstance(each, int):  # every lot begins at a byte
        return b"".join(np.packbits(bits, bitorder="little").tobytes() for bits in found)
    return np.packbits(np.concatenate([*found, np.empty(0, np.uint8)]), bitorder="little").tobytes()


def unpack(data: bytes, shape: Sequence[int], widths: int | Tensor) -> Tensor:
    """The integers that `pack` made `data` of, int64 of the given shape.

    Errors: ValueError on widths as in `pack`, on data of another length, on padding that is not zero.
    """
    count, each = int(np.prod(shape, dtype=np.int64)), _widths(widths, tuple(shape))
    bits = count * each if isinstance(each, int) else int(each.sum())
    if len(data) != -(-bits // 8):
        raise ValueError(f"{count} codes of {bits} bits in all take {-(-bits // 8)} bytes, got {len(data)}")
    raw = np.frombuffer(data, np.uint8)
    if bits % 8 and raw[-1] >> bits % 8:
        raise ValueError("the bits behind the last code must be 0")
    numbers, place = np.empty(count, np.int64), 0
    for lot, width in _lots(count, each):
        now = lot.stop - lot.start
        length = now * width if isinstance(width, int) else int(width.sum())
        first, last = place // 8, -(-(place + length) // 8)
        stream = np.unpackbits(raw[first:last], bitorder="little")[place % 8 :][:length]
        word = _word(width)
        rows = np.zeros((now, 8 * word.itemsize), np.uint8)
        if isinstance(width, int):
            rows[:, :width] = stream.reshape(now, width)
        else:
            rows[_inside(width, rows)] = stream
        numbers[lot] = np.packbits(rows, bitorder="little").view(word)
        place += length
    return torch.from_numpy(numbers).reshape(tuple(shape))


def _widths(widths: int | Tensor, shape: tuple[int, ...]) -> int | np.ndarray:
    """One width, or one of each number."""
    if not isinstance(widths, Tensor):
        if isinstance(widths, bool) or not isinstance(widths, int) or not 1 <= widths <= WIDEST:
            raise ValueError(f"a width must be a whole number in 1..{WIDEST}, got {widths!r}")
        return widths
    each = widths.detach().cpu().numpy()
    if each.dtype.kind not in "iu" or (each.size and not (each.min() >= 1 and each.max() <= WIDEST)):
        raise ValueError(f"widths must be whole numbers in 1..{WIDEST}, got {widths.dtype} {each.reshape(-1)[:8]}")
    try:
        return np.broadcast_to(each, shape).reshape(-1)
    except ValueError as error:
        raise ValueError(f"widths of shape {list(each.shape)} do not broadcast to codes of {list(shape)}") from error


def _lots(count: int, widths: int | np.ndarray) -> Iterator[tuple[slice, int | np.ndarray]]:
    for first in range(0, count, AT_ONCE):
        lot = slice(first, min(first + AT_ONCE, count))
        yield lot, widths if isinstance(widths, int) else widths[lot]


def _word(width: int | np.ndarray) -> np.dtype:
    """The smallest word that holds the widest."""
    return np.dtype(next(word for word in ("<u1", "<u2", "<u4") if 8 * np.dtype(word).itemsize >= np.max(width)))


def _check_fit(codes: np.ndarray, width: int | np.ndarray) -> None:
    limit = 2 ** np.asarray(width, np.int64)
    if codes.size and (codes.min() < 0 or (codes.max() >= limit).any()):
        wrong = (codes < 0) | (codes >= limit)
        if wrong.any():
            first = int(wrong.argmax())
            of = int(np.broadcast_to(width, codes.shape)[first])
            raise ValueError(f"code {int(codes[first])} does not fit into {of} bits")


def _inside(widths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which bits of each row belong to its number."""
    return np.arange(rows.shape[1]) < widths[:, None]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Part:
    """One array of what a packed file holds: unsigned integers of `widths` bits each, or floats of 32 bits.

    A part begins at a byte. `bits` is what its numbers take, `pack` fills the last byte up: len(pack()) =
    ceil(bits / 8). Floats are IEEE 754 single precision, little-endian.
    """

    numbers: Tensor
    widths: int | Tensor = 32

    @property
    def bits(self) -> int:
        if isinstance(self.widths, int):
            return self.numbers.numel() * self.widths
        return int(self.widths.expand(self.numbers.shape).sum())

    @property
    def size(self) -> int:
        """Bytes, the padding included."""
        return -(-self.bits // 8)

    def pack(self) -> bytes:
        if self.numbers.is_floating_point():
            return self.numbers.detach().cpu().contiguous().numpy().astype("<f4").tobytes()  # type: ignore[no-any-return]
        return pack(self.numbers, self.widths)

    def unpack(self, data: bytes) -> "Part":
        """A part of this shape and these widths with the numbers that `data` holds."""
        shape = tuple(self.numbers.shape)
        if self.numbers.is_floating_point():
            if len(data) != self.size:
                raise ValueError(f"{self.numbers.numel()} floats take {self.size} bytes, got {len(data)}")
            numbers = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).reshape(shape)
        else:
            numbers = unpack(data, shape, self.widths)
        return Part(numbers, self.widths)
