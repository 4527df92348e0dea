"""The grids that quantizers put tensors on: equal steps, a table of values, or sums of +-coefficients.

A grid holds tensors that broadcast against the tensor that is quantized: one number, one of each channel, group or
image. It turns integer codes into values, and values that lie on it back into their codes. `affine`, `signs`, `planes`,
`book` and `multiples` make one; a scale is given as
  a tensor: stored beside the codes
  a number: a constant of the method, which nothing stores
  None:     the scale is one of the tensor's own (its mean, say), and no tensor is at hand: 1 stands for it, and the
            grid is `dynamic`
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from qbench.quant.packing import Part

Scale = Tensor | float | None


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """What the kinds share: codes lo..hi, in `width` bits each when lo is subtracted.

    Where channels or groups have widths of their own, hi is an integer tensor of the shape of the scales.
    """

    lo: int
    hi: int | Tensor
    dynamic: bool = False
    constants: tuple[str, ...] = ()  # the names of tensors that are constants of the method

    @property
    def width(self) -> int | Tensor:
        """Bits of a code, at least 1."""
        span = self.hi - self.lo
        if isinstance(span, Tensor):
            return span.double().frexp().exponent.clamp_min(1)
        return max(1, span.bit_length())

    @property
    def levels(self) -> int:
        """How many codes are used, of each scale; the most where they differ."""
        return int(torch.as_tensor(self.hi).max()) - self.lo + 1

    def pack(self, codes: Tensor) -> Part:
        """Codes as a packed file holds them."""
        return Part(codes - self.lo, self.width)

    def unpack(self, part: Part) -> Tensor:
        """The codes that `pack` made this part of, int32."""
        return part.numbers.to(torch.int32) + self.lo

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """The value of each code, float32."""

    @abstractmethod
    def codes(self, value: Tensor, source: Tensor) -> Tensor:
        """The code, int32, of each `value` on the grid; `source` is what it was quantized from."""

    @abstractmethod
    def tables(self, encoder: bool = False) -> dict[str, Part]:
        """What is stored beside codes to decode them; with `encoder` also what a device needs to make codes."""

    @abstractmethod
    def ends(self) -> tuple[Tensor, Tensor]:
        """(least, greatest) value, of each scale."""


@dataclass(frozen=True, kw_only=True)
class Affine(Grid):
    """value = (code - zero) * step + offset.

    zero: whole numbers in lo..hi, stored in the width of a code. offset: any number, stored in 32 bits; None: 0.
    view: the shape in which scales broadcast, where it is not the tensor's own: (n / 8, 8) with scales of (n / 8, 1)
    for groups of eight of its n numbers.
    """

    step: Tensor
    zero: Tensor
    view: tuple[int, ...] = ()
    offset: Tensor | None = None

    def values(self, codes: Tensor) -> Tensor:
        return self._moved((self._seen(codes) - self.zero) * self.step).reshape(codes.shape)

    def codes(self, value: Tensor, source: Tensor) -> Tensor:
        seen = self._seen(value) if self.offset is None else self._seen(value) - self.offset
        place = torch.where(self.step == 0, self.zero.ceil(), seen / self.step + self.zero)  # no step: all are worth 0
        codes = torch.minimum(place.round().clamp_min(self.lo), torch.as_tensor(self.hi))
        return codes.to(torch.int32).reshape(value.shape)

    def pack(self, codes: Tensor) -> Part:
        width = self.width
        if self.view and isinstance(width, Tensor):
            width = width.expand(self.view).reshape(codes.shape)
        return Part(codes - self.lo, width)

    def _seen(self, x: Tensor) -> Tensor:
        return x.reshape(self.view) if self.view else x

    def _moved(self, value: Tensor) -> Tensor:
        return value if self.offset is None else value + self.offset

    def tables(self, encoder: bool = False) -> dict[str, Part]:
        found = {"step": Part(self.step)}
        if "zero" not in self.constants:
            found["zero"] = Part((self.zero - self.lo).to(torch.int32), self.width)
        if self.offset is not None:
            found["offset"] = Part(self.offset)
        if isinstance(self.width, Tensor):
            found["widths_less_1"] = Part(self.width - 1, 5)
        return {name: part for name, part in found.items() if name not in self.constants}

    def ends(self) -> tuple[Tensor, Tensor]:
        return self._moved((self.lo - self.zero) * self.step), self._moved((self.hi - self.zero) * self.step)


@dataclass(frozen=True, kw_only=True)
class Book(Grid):
    """value = table[..., code]: of the whole tensor, [values], or of each channel or group, [*of its shape, values].

    In product quantization a code stands for a `block` of d consecutive weights of an output channel (their order in
    memory, [in, kernel, kernel]): `shape` is the tensor's, codes are [channels, weights of a channel / d], and `table`
    [values, d], or with what broadcasts against the codes in front: [channels, 1, values, d] for a table per channel,
    [1, blocks, values, d] for one of each place.
    """

    table: Tensor
    shape: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()  # codes whose values are constants of the method
    scale: Tensor | None = None  # where all values are constants of the method times this, which is stored for them
    factors: tuple[float, ...] = ()  # these constants

    def values(self, codes: Tensor) -> Tensor:
        if not self.shape:
            return _look_up(self.table, codes)
        words = [_look_up(self.table[..., i], codes) for i in range(self.table.shape[-1])]
        return torch.stack(words, -1).reshape(self.shape)

    def codes(self, value: Tensor, source: Tensor) -> Tensor:
        if not self.shape:
            return _nearest(self.table.unbind(-1), value)
        blocks = value.reshape(self.shape[0], -1, self.table.shape[-1])
        return _nearest(self.table.unbind(-2), blocks, vectors=True)

    def tables(self, encoder: bool = False) -> dict[str, Part]:
        if self.scale is not None:
            return {} if "scale" in self.constants else {"scale": Part(self.scale)}
        stored = [code for code in range(self.hi + 1) if code not in self.fixed]
        return {"table": Part(self.table[..., stored, :] if self.shape else self.table[..., stored])}

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.table.amin(-1), self.table.amax(-1)


@dataclass(frozen=True, kw_only=True)
class Planes(Grid):
    """value = sum_i coefficients[i] * plane_i, a plane being -1 or +1: bit i of the code is 1 where plane i is +1.

    coefficients: [q, ...], each broadcasting against the tensor. thresholds: the same; then plane i is +1 where
    x >= thresholds[i], and only q + 1 of the codes come out. pruned: one more code, 2^q, whose value is 0.
    """

    coefficients: Tensor
    thresholds: Tensor | None = None
    pruned: bool = False

    @property
    def levels(self) -> int:
        return super().levels if self.thresholds is None else len(self.thresholds) + 1

    def values(self, codes: Tensor) -> Tensor:
        total: Tensor = reduce(torch.add, (c * (2 * (codes >> i & 1) - 1) for i, c in enumerate(self.coefficients)))
        return total.masked_fill(codes == self.hi, 0.0) if self.pruned else total

    def codes(self, value: Tensor, source: Tensor) -> Tensor:
        if self.thresholds is not None:
            return self.join([source >= t for t in self.thresholds])
        return _nearest([self.values(torch.tensor(c, device=value.device)) for c in range(self.hi + 1)], value)

    @staticmethod
    def join(planes: Sequence[Tensor] | Tensor) -> Tensor:
        """The codes, int32, whose bits are these planes of bools."""
        codes: Tensor = reduce(torch.bitwise_or, (plane.to(torch.int32) << i for i, plane in enumerate(planes)))
        return codes

    def split(self, codes: Tensor) -> Tensor:
        """The planes of -1 and +1 of codes, int8 [q, *codes]; 0 where pruned."""
        planes = torch.stack([2 * (codes >> i & 1) - 1 for i in range(len(self.coefficients))]).to(torch.int8)
        return planes.masked_fill(codes == self.hi, 0) if self.pruned else planes

    def tables(self, encoder: bool = False) -> dict[str, Part]:
        found = {"coefficients": Part(self.coefficients)}
        if encoder and self.thresholds is not None:
            found["thresholds"] = Part(self.thresholds)
        return {name: part for name, part in found.items() if name not in self.constants}

    def ends(self) -> tuple[Tensor, Tensor]:
        if self.thresholds is None:
            most = self.coefficients.abs().sum(0)
            return -most, most
        order = self.thresholds.argsort(0)
        steps = 2 * self.coefficients.expand_as(self.thresholds).gather(0, order).cumsum(0)
        found = torch.cat([torch.zeros_like(steps[:1]), steps]) - self.coefficients.sum(0)
        return found.amin(0), found.amax(0)


def affine(
    step: Scale,
    lo: int,
    hi: int | Tensor,
    zero: Tensor | float = 0.0,
    view: Sequence[int] = (),
    offset: Tensor | None = None,
) -> Affine:
    """Codes lo..hi, value = (code - zero) * step + offset.

    A `zero` that is a tensor holds whole numbers in lo..hi; what moves the grid by any other amount is the `offset`.
    """
    constants = [name for name, given in (("step", step), ("zero", zero)) if isinstance(given, float | int)]
    return Affine(
        step=_tensor(step, zero),
        zero=_tensor(zero, step),
        lo=lo,
        hi=hi,
        view=tuple(view),
        offset=None if offset is None else offset.detach(),
        dynamic=step is None,
        constants=tuple(constants),
    )


def book(table: Tensor, shape: Sequence[int] = (), fixed: Sequence[int] = ()) -> Book:
    """Codes 0..values - 1; see `Book`.

    Errors: ValueError where a channel of `shape` is no whole number of blocks.
    """
    if shape:
        weights, block = torch.Size(shape[1:]).numel(), table.shape[-1]
        if weights % block:
            raise ValueError(f"a channel of {weights} weights is no whole number of blocks of {block}")
    values = table.shape[-2 if shape else -1]
    return Book(table=table.detach(), shape=tuple(shape), fixed=tuple(fixed), lo=0, hi=values - 1)


def multiples(scale: Scale, values: Sequence[float]) -> Book:
    """Codes 0..values - 1, value = values[code] * scale: a book whose values are constants of the method."""
    known = _tensor(scale, None)
    table = known.unsqueeze(-1) * torch.tensor(values, device=known.device)
    constants = ("scale",) if isinstance(scale, float | int) else ()
    return Book(
        table=table,
        scale=known,
        factors=tuple(values),
        lo=0,
        hi=len(values) - 1,
        dynamic=scale is None,
        constants=constants,
    )


def planes(coefficients: Scale, thresholds: Tensor | float | None = None, pruned: bool = False, q: int = 1) -> Planes:
    """See `Planes`; `q` is how many, where `coefficients` is None or a number."""
    given = isinstance(coefficients, Tensor)
    first = coefficients.detach() if isinstance(coefficients, Tensor) else torch.full((q,), coefficients or 1.0)
    bounds = torch.full((q,), float(thresholds)) if isinstance(thresholds, float | int) else thresholds
    return Planes(
        coefficients=first,
        thresholds=bounds,
        pruned=pruned,
        lo=0,
        hi=2 ** len(first) - (not pruned),
        dynamic=coefficients is None,
        constants=(("coefficients",) if not given and coefficients is not None else ())
        + (("thresholds",) if not isinstance(thresholds, Tensor) else ()),
    )


def signs(scale: Scale, thresholds: Tensor | float | None = None) -> Planes:
    """Codes 0 and 1, values -scale and +scale: one plane. `scale` and `thresholds` broadcast against the tensor."""
    one = scale[None] if isinstance(scale, Tensor) else scale
    return planes(one, thresholds[None] if isinstance(thresholds, Tensor) else thresholds)


def _tensor(value: Scale, like: Scale) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    device = like.device if isinstance(like, Tensor) else None
    return torch.tensor(1.0 if value is None else float(value), device=device)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[..., code], the axes before the last broadcast against the codes."""
    index = codes.long()
    if table.dim() == 1:
        return table[index]
    return table.expand(*codes.shape, table.shape[-1]).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _nearest(values: Sequence[Tensor], x: Tensor, vectors: bool = False) -> Tensor:
    """Of each x, or of each vector in its last axis, the place of the nearest value; of equally near ones the last."""
    best = None
    for code, value in enumerate(values):
        off = (x - value).square().sum(-1) if vectors else (x - value).abs()
        if best is None:
            best, found = off, torch.zeros(off.shape, dtype=torch.int32, device=off.device)
        else:
            better = off <= best
            best, found = torch.where(better, off, best), found.masked_fill_(better, code)
    return found
