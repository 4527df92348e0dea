"""Uniform grids for weights and activations: affine or symmetric, per tensor, channel or group, ranges by rules."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant import ops, ranges
from qbench.quant.grid import Affine
from qbench.quant.quantizer import Kernel, Quantizer, check_bits, check_choice


@ops.formula
def _on_grid(x: Tensor, step: Tensor, zero: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """(x_hat, where nothing was clipped)."""
    codes = ranges.codes(x, step, zero)
    inside = (codes >= lowest) & (codes <= highest)
    return codes.clamp_(lowest, highest).sub_(zero).mul_(step), inside


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, lowest: int, highest: int) -> Tensor:
        y, inside = _on_grid(x, step, zero, lowest, highest)
        ctx.save_for_backward(inside)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None, None, None


class UniformGrid(Quantizer):
    """Equal steps with 0 on the grid; a subclass says where the grid lies.

    x_hat = (clip(round(x / step) + zero, lowest, highest) - zero) * step, rounding half to even. Gradient: 1 where the
    code needed no clipping (so half a step beyond either end still counts as inside), else 0; none to step and zero.

    Args:
        layer: gives the number of channels when `per_channel`
        site: weight, or any activation or error site
        bits: 2..16
        symmetric: zero = 0 and signed codes (0..2^bits - 1 for activations that `Uniform` has never seen below 0);
            otherwise affine, codes 0..2^bits - 1
        restricted: leave the lowest code unused, so that symmetric codes have equally many values on both sides
        per_channel: one step per output channel (axis 0); weights only
        group: one step for so many neighbouring input weights of a channel; weights only. Where a channel is no whole
            number of groups, they have the size that divides it and is nearest in ratio, of two the larger

    Raises:
        ValueError: bits out of range; per_channel or group elsewhere than on a weight; a group below 1

    Reference: 1806.08342 Sec. 2.1-2.3; 1712.05877 Sec. 3
    """

    told = ("symmetric", "group")

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        symmetric: bool = False,
        restricted: bool = False,
        per_channel: bool = False,
        group: int | None = None,
    ) -> None:
        super().__init__()
        if (per_channel or group) and site != "weight":
            raise ValueError(f"per_channel and group are for weights: the {site} of a layer has one step")
        self.bits = check_bits(bits, 2, 16)
        self.site, self.symmetric, self.restricted, self.per_channel = site, symmetric, restricted, per_channel
        self.signed = symmetric
        self.granularity = "per_group" if group else "per_channel" if per_channel else "per_tensor"
        weight = getattr(layer, "weight", None)
        self.shape: tuple[int, ...] = ()
        self.view: tuple[int, ...] = ()
        self.group = None
        if group and weight is not None:
            self.group = _group_size(group, weight[0].numel())
            self.view = (weight.numel() // self.group, self.group)
            self.shape = (self.view[0], 1)
        elif per_channel and weight is not None:
            self.shape = (weight.shape[0], *[1] * (weight.dim() - 1))

    @property
    def bounds(self) -> tuple[int, int]:
        """(lowest, highest) code."""
        return ranges.code_bounds(int(self.bits), self.symmetric, self.restricted, self.signed)

    @abstractmethod
    def grid(self, x: Tensor | None = None) -> Affine:
        """A float step, and a zero point that is 0 where symmetric, of the tensor or of each channel or group."""

    def _between(self, step: Tensor, zero: Tensor, dynamic: bool = False) -> Affine:
        lo, hi = self.bounds
        constants = ("zero",) if self.symmetric else ()
        return Affine(step=step, zero=zero, lo=lo, hi=hi, view=self.view, dynamic=dynamic, constants=constants)

    def rows(self, x: Tensor) -> Tensor:
        """`x` with one row per step: [channels or groups, n], or [n]."""
        if self.view:
            return x.reshape(self.view)
        return x.flatten(1) if self.per_channel else x.flatten()

    def quantize(self, x: Tensor) -> Tensor:
        grid, seen = self.grid(x), x.reshape(self.view) if self.view else x
        return _OnGrid.apply(seen, grid.step, grid.zero, *self.bounds).reshape(x.shape)  # type: ignore[no-any-return, no-untyped-call]

    def kernel(self, shape: torch.Size) -> Kernel | None:
        grid = self.grid()
        if grid.dynamic or self.shape:
            return None
        lo, hi = self.bounds
        return Kernel("grid", grid.step.item(), lo=lo, hi=hi, zero=grid.zero.item())

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "signed": self.signed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.signed = state.get("signed", self.symmetric)  # older checkpoints: always signed


def _group_size(group: int, weights: int) -> int:
    """The divisor of `weights`, those of a channel, that is nearest to `group` in ratio; of two the larger."""
    if isinstance(group, bool) or group != int(group) or group < 1:
        raise ValueError(f"group must be a whole number of at least 1, or null, got {group!r}")
    divisors = (d for d in range(weights, 0, -1) if weights % d == 0)
    return min(divisors, key=lambda d: max(d / group, group / d))


class Uniform(UniformGrid):
    """A uniform grid over a range found once, from the weight or the calibration images, and then held.

    Exact minima and maxima are kept over all batches, and for the other ranges the 32 smallest and largest values of
    each batch. Of the rest they see a random sample (drawn with a fixed seed, at most 2^20 values, 2^16 of the first
    batch), each value of which counts for as many as it was drawn from. A weight is seen whole. Before calibration the
    range is -1..1.

    Args:
        range: one of `ranges.KINDS`:
            minmax | percentile | mse | kl | aciq | aciq_gauss | aciq_laplace (see qbench.quant.ranges);
            ema: moving averages of each calibration batch's minimum and maximum, lo <- decay lo + (1 - decay) min(x),
                of which the first batch is the first; for activations
            fixed: -clip..clip; std: clip standard deviations about the mean; both no further than the values go
        percentile: for range=percentile, in percent
        clip: for range=fixed and range=std, above 0
        decay: for range=ema, at least 0 and below 1
        half_range: of symmetric activations: auto (codes 0..2^bits - 1 where none was ever negative), always (negative
            ones become 0), never (signed codes)
        others: as UniformGrid

    Raises:
        ValueError: an argument out of range; ema of a weight; half_range=always where it does not apply

    Reference: 1806.08342 Sec. 3 (minmax); 1712.05877 Sec. 3.1 (ema); ranges.py for the others
    """

    SAMPLE = 2**16
    MOST = 2**20
    TAIL = 32
    lo: Tensor
    hi: Tensor
    step: Tensor
    zero: Tensor

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        symmetric: bool = False,
        restricted: bool = False,
        per_channel: bool = False,
        group: int | None = None,
        range: str = "minmax",
        percentile: float = 99.99,
        clip: float | None = None,
        decay: float = 0.99,
        half_range: str = "auto",
    ) -> None:
        grid = {"symmetric": symmetric, "restricted": restricted, "per_channel": per_channel, "group": group}
        super().__init__(layer, site, bits=bits, **grid)  # type: ignore[arg-type]
        self.range = check_choice("range", range, ranges.KINDS)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
        if range in ("fixed", "std") and (clip is None or clip <= 0):
            raise ValueError(f"range={range} needs a clip above 0, got {clip}")
        if range == "ema" and site == "weight":
            raise ValueError("range=ema averages over calibration batches: it is for activations")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.percentile, self.clip, self.decay = percentile, clip, decay
        self.half_range = check_choice("half_range", half_range, ("auto", "always", "never"))
        if half_range == "always" and not symmetric:
            raise ValueError("half_range=always is for symmetric activations: an affine grid begins where they do")
        for name in ("lo", "hi", "step", "zero"):
            self.register_buffer(name, torch.ones(self.shape))
        self._set_range(-torch.ones(self.shape), torch.ones(self.shape))
        self._seen: list[Tensor] = []
        self._tails: list[Tensor] = []
        self._extremes: tuple[Tensor, Tensor] | None = None
        self._forget()

    def grid(self, x: Tensor | None = None) -> Affine:
        return self._between(self.step, self.zero)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Take in the weight, or one batch of activations."""
        x = self.rows(x.detach().float())
        lo, hi = ranges.minmax(x)
        if self._extremes is not None and self.range == "ema":
            lo, hi = (old.lerp(new, 1 - self.decay) for old, new in zip(self._extremes, (lo, hi), strict=True))
        elif self._extremes is not None:
            lo, hi = torch.minimum(lo, self._extremes[0]), torch.maximum(hi, self._extremes[1])
        self._extremes = lo, hi
        if self.range in ("minmax", "ema"):
            return
        if self.site == "weight":
            self._seen = [x]
        else:
            self._collect(x)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Set the range from what was seen; where nothing was seen it stays."""
        if self._extremes is None:
            return
        lo, hi = self._extremes
        half = self.half_range == "always" or (self.half_range == "auto" and not bool((lo < 0).any()))
        self.signed = self.symmetric and (self.site == "weight" or not half)
        x, weights = torch.stack([lo, hi], -1), None
        if self._seen:
            x = torch.cat([*self._seen, *self._tails])
        if self._tails:
            drawn = x.numel() - sum(t.numel() for t in self._tails)
            weights = torch.ones(x.numel(), device=x.device)
            weights[drawn:] = self._share or 1.0
        if self.symmetric and not self.signed:
            x = x.clamp_min(0)
        lo, hi = ranges.find(
            self.range,
            x,
            bits=int(self.bits),
            symmetric=self.symmetric,
            restricted=self.restricted,
            signed=self.signed,
            percent=self.percentile,
            clip=self.clip,
            weights=weights,
        )
        self._set_range(lo, hi)
        self._forget()

    def _forget(self) -> None:
        """Drop what calibration collected; none of it is state that a checkpoint must hold."""
        self._seen, self._tails, self._extremes = [], [], None
        self._share: float | None = None
        self._random = torch.Generator().manual_seed(0)

    def _collect(self, x: Tensor) -> None:
        """Keep both tails; add to the sample the same share of every batch's rest.

        Beyond MOST values the sample, and the share, are halved.
        """
        if self._share is None:
            self._share = min(1.0, self.SAMPLE / x.numel())
        tails = torch.cat([x.topk(min(self.TAIL, (x.numel() + end) // 2), largest=bool(end)).indices for end in (0, 1)])
        rest = torch.ones(x.numel(), dtype=torch.bool, device=x.device)
        rest[tails] = False
        self._tails.append(x[rest.logical_not()])
        if self._share < 1:
            count = max(1, round(self._share * x.numel()))
            drawn = torch.randint(x.numel(), (count,), generator=self._random).to(x.device)
            x, rest = x[drawn], rest[drawn]
        self._seen.append(x[rest])
        if sum(s.numel() for s in self._seen) > self.MOST:
            seen = torch.cat(self._seen)
            keep = torch.randperm(seen.numel(), generator=self._random)[: seen.numel() // 2].to(x.device)
            self._seen, self._share = [seen[keep]], self._share / 2

    def _set_range(self, lo: Tensor, hi: Tensor) -> None:
        lo, hi = lo.clamp_max(0).reshape(self.shape), hi.clamp_min(0).reshape(self.shape)
        step, zero = ranges.grid(lo, hi, self.bounds, self.symmetric)
        for buffer, value in ((self.lo, lo), (self.hi, hi), (self.step, step), (self.zero, zero)):
            buffer.copy_(value)
