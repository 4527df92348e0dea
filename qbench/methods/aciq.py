"""ACIQ: inputs clipped where it loses least, bits dealt out to channels, weights with their mean and spread put back.

Reference: 1810.05723; where its text was not at hand, the authors' code (submission2019/cnn-quantization)
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.quant import ranges
from qbench.quant.clipping import DISTRIBUTIONS, best
from qbench.quant.grid import Affine, affine
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer, check_bits, check_choice

FEWEST, MOST = 1, 8  # bits of a channel


def bins(sizes: Tensor, bits: float) -> Tensor:
    """How many of n 2^bits bins each of n channels gets: in proportion to size^(2/3), the size being half its range.

    Reference: 1810.05723, bit allocation
    """
    share: Tensor = sizes.double().pow(2 / 3)
    return math.pow(2, bits) * len(sizes) / share.sum() * share


def allocate(sizes: Tensor, bits: int) -> Tensor:
    """Whole bits of each channel, in 1..8, whose mean is `bits`: log2 of `bins`, moved by what it takes and rounded.

    One bit after the other goes to the channel that lies farthest below its log2, of equally far ones to the first.
    The authors' code moves the number of bins until the mean fits; there 0 bits are possible.
    """
    wanted = bins(sizes.clamp_min(sizes.max().clamp_min(1e-30) * 2.0**-30), bits).log2()
    lack = ((wanted[:, None] - torch.arange(FEWEST, MOST, device=sizes.device)) * 2**24).round()  # ties are ties
    chosen = lack.flatten().argsort(descending=True, stable=True)[: len(sizes) * (bits - FEWEST)]
    given = torch.zeros_like(lack, dtype=torch.bool).flatten()
    given[chosen] = True
    return FEWEST + given.reshape(lack.shape).sum(1)


def correction(rows: Tensor, hats: Tensor) -> tuple[Tensor, Tensor]:
    """(xi, offset), [channels, 1], with which xi hats + offset has the mean and the spread of `rows`, row by row.

    xi = ||row - mean|| / ||hat - mean||, 1 where either is 0; offset = mean of the row - xi * mean of the hat.

    Reference: 1810.05723, bias correction
    """
    mean, mean_hat = rows.mean(1, keepdim=True), hats.mean(1, keepdim=True)
    before, after = (rows - mean).norm(dim=1, keepdim=True), (hats - mean_hat).norm(dim=1, keepdim=True)
    xi = torch.where((after > 0) & (before > 0), before / after, 1.0)
    return xi, mean - xi * mean_hat


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, highest: Tensor, gain: Tensor) -> Tensor:
        codes = ranges.codes(x, step, zero)
        ctx.save_for_backward((codes >= 0) & (codes <= highest), gain)
        return torch.minimum(codes.clamp_(min=0), highest).sub_(zero).mul_(step * gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        inside, gain = ctx.saved_tensors
        return grads[0] * inside * gain, None, None, None, None


class Channels(Quantizer):
    """An affine grid with 0 on it for each channel, or for the tensor, whose bits may differ from channel to channel.

    x_hat = (clip(round(x / step) + zero, 0, 2^bits - 1) - zero) * step, the bits, step and zero being the channel's.
    Gradient: 1 where no code was clipped, else 0.
    """

    told: tuple[str, ...] = ("allocate",)
    widths: Tensor
    step: Tensor
    zero: Tensor

    def __init__(self, bits: int, shape: tuple[int, ...], allocate: bool) -> None:
        super().__init__()
        self.asked, self.allocate = check_bits(bits, 2, MOST), allocate
        self.register_buffer("widths", torch.full(shape, self.asked))
        for name in ("step", "zero"):
            self.register_buffer(name, torch.ones(shape))
        self._set(-torch.ones(shape), torch.ones(shape), self.widths)

    @property
    def bits(self) -> float:  # type: ignore[override]
        """The mean over the channels."""
        return self.widths.double().mean().item()

    @property
    def highest(self) -> Tensor:
        """The highest code of each channel."""
        return 2**self.widths - 1

    def _set(self, lo: Tensor, hi: Tensor, widths: Tensor) -> None:
        """The grids of lo..hi, as `ranges.grid` has them, with 2^widths codes."""
        self.widths.copy_(widths.reshape(self.widths.shape))
        lo, hi = lo.clamp_max(0).reshape(self.step.shape), hi.clamp_min(0).reshape(self.step.shape)
        step = (hi - lo) / self.highest
        step = torch.where(step < torch.finfo(step.dtype).tiny, 1.0, step)
        self.step.copy_(step)
        self.zero.copy_(torch.minimum((-lo / step).round(), self.highest))

    def grid(self, x: Tensor | None = None) -> Affine:
        return affine(self.step, 0, self.highest if self.allocate else 2**self.asked - 1, self.zero)

    def quantize(self, x: Tensor) -> Tensor:
        return self._stretched(x, torch.ones_like(self.step))

    def _stretched(self, x: Tensor, gain: Tensor) -> Tensor:
        """With steps `gain` times as long behind the codes."""
        return _OnGrid.apply(x, self.step, self.zero, self.highest, gain)  # type: ignore[no-any-return, no-untyped-call]


class Weight(Channels):
    """Weights over their whole range, per output channel; the codes' values are then stretched and moved.

    correct: x_hat <- xi (x_hat - mean x_hat) + mean x, by channel (`correction`), so that its mean and its spread are
    those of the float channel. It costs nothing but another step, and an offset. Gradient: xi where no code was
    clipped. Both are found once.

    Args:
        bits: 2..8, with `allocate` the mean over the channels of the layer
        allocate: more bits to channels of a larger range
        correct: bias correction

    Errors: ValueError on bits out of range.
    Reference: 1810.05723; of the correction the code's form: the printed one, xi (x_hat + mean x - mean x_hat), does
        not keep the mean
    """

    granularity = "per_channel"
    told = ("allocate", "correct")
    gain: Tensor
    offset: Tensor

    def __init__(self, layer: QuantLayer, site: str, *, bits: int, allocate: bool = True, correct: bool = True) -> None:
        channels = layer.weight_shape[0]
        super().__init__(bits, (channels, 1), allocate)
        self.view = (channels, layer.weight[0].numel())
        self.correct, self.idempotent = correct, not correct  # type: ignore[misc]
        self.register_buffer("gain", torch.ones(channels, 1))
        self.register_buffer("offset", torch.zeros(channels, 1))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        rows = x.detach().float().reshape(self.view)
        lo, hi = ranges.minmax(rows)
        self._set(lo, hi, allocate((hi - lo) / 2, self.asked) if self.allocate else self.widths)
        if self.correct:
            gain, offset = correction(rows, Channels.quantize(self, rows))
            self.gain.copy_(gain)
            self.offset.copy_(offset)

    def grid(self, x: Tensor | None = None) -> Affine:
        found = super().grid()
        offset = self.offset if self.correct else None
        return affine(self.step * self.gain, 0, found.hi, self.zero, view=self.view, offset=offset)

    def quantize(self, x: Tensor) -> Tensor:
        rows = x.reshape(self.view)
        hat = self._stretched(rows, self.gain) + self.offset if self.correct else super().quantize(rows)
        return hat.reshape(x.shape)


class Activation(Channels):
    """Inputs clipped to mean +- a, and to 0..max(mean, 0) + a where none is negative; no further than they go.

    a is that of the least error for the distribution and the channel's bits (`clipping.best`), times E|x - mean| for
    laplace, the standard deviation for gauss. The authors' code quantizes before ReLUs; behind one, mean and scale are
    found from its upper half (`ranges.upper_half`), of at most 2^14 values of a channel and batch. Statistics are the
    means over the calibration batches of each batch's; so are the ends of a range that is not clipped. A linear layer's
    input has one range.

    Args:
        bits: 2..8, with `allocate` the mean over the channels
        clip: laplace | gauss | none
        per_channel: of a convolution's input each channel has a range of its own
        allocate: more bits to channels of a larger range; needs per_channel

    Errors: ValueError on an argument out of range.
    Reference: 1810.05723
    """

    told = ("allocate", "clip")
    SAMPLE = 2**14

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: int,
        clip: str = "laplace",
        per_channel: bool = True,
        allocate: bool = True,
    ) -> None:
        if allocate and not per_channel:
            raise ValueError("bits are allocated to channels: a_allocate=true needs a_per_channel=true")
        by_channel = layer.conv and per_channel
        shape = (1, layer.weight_shape[1] * layer.groups, 1, 1) if by_channel else ()
        super().__init__(bits, shape, allocate and by_channel)
        self.clip = check_choice("clip", clip, (*DISTRIBUTIONS, "none"))
        self.granularity = "per_channel" if by_channel else "per_tensor"
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        x = x.detach().float()
        rows = x.transpose(0, 1).flatten(1) if self.widths.dim() else x.reshape(1, -1)
        some = rows
        if rows.shape[1] > self.SAMPLE:  # drawn with a fixed seed
            random = torch.Generator().manual_seed(0)
            some = rows[:, torch.randint(rows.shape[1], (self.SAMPLE,), generator=random).to(x.device)]
        half = ranges.upper_half(some.clamp_min(0))
        self._seen.append(torch.stack([*ranges.minmax(rows), *ranges.moments(rows), *half]))

    @torch.no_grad()
    def finish_calibration(self) -> None:
        if not self._seen:
            return
        seen, self._seen = torch.stack(self._seen), []
        half = seen[:, 0].amin(0) >= 0
        lo, hi, *both = seen.mean(0)
        mean, spread, deviation = (torch.where(half, b, a) for a, b in zip(both[:3], both[3:], strict=True))
        scale = deviation if self.clip == "gauss" else spread
        sizes = (hi - lo) / 2 if self.clip == "none" else scale
        widths = (allocate(sizes, self.asked) if self.allocate else self.widths.reshape(-1)).to(lo.device)
        if self.clip != "none":
            a = scale * scale.new_tensor(
                [best(self.clip, w, h) for w, h in zip(widths.tolist(), half.tolist(), strict=True)]
            )
            lo = torch.where(half, 0.0, torch.maximum(lo, mean - a))
            hi = torch.minimum(hi, torch.where(half, mean.clamp_min(0), mean) + a)
        self._set(lo, hi, widths)
