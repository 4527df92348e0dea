"""Uniform grids for weights and activations: affine or symmetric, per tensor or per channel, ranges by four rules."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant import ops, ranges
from qbench.quant.quantizer import Codes, Kernel, Quantizer, check_bits, check_choice


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

    Raises:
        ValueError: bits out of range, or per_channel elsewhere than on a weight

    Reference: 1806.08342 Sec. 2.1-2.3; 1712.05877 Sec. 3
    """

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        symmetric: bool = False,
        restricted: bool = False,
        per_channel: bool = False,
    ) -> None:
        super().__init__()
        if per_channel and site != "weight":
            raise ValueError(f"per_channel is for weights: the {site} of a layer has one step")
        self.bits = check_bits(bits, 2, 16)
        self.site, self.symmetric, self.restricted, self.per_channel = site, symmetric, restricted, per_channel
        self.bounds = ranges.code_bounds(self.bits, symmetric, restricted)
        self.signed = symmetric
        self.granularity = "per_channel" if per_channel else "per_tensor"
        weight = getattr(layer, "weight", None)
        self.shape = (weight.shape[0], *[1] * (weight.dim() - 1)) if per_channel and weight is not None else ()

    @abstractmethod
    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(step, zero) for `x`, both of a shape that broadcasts to it."""

    def rows(self, x: Tensor) -> Tensor:
        """`x` with one row per step: [channels, n], or [n]."""
        return x.flatten(1) if self.per_channel else x.flatten()

    def quantize(self, x: Tensor) -> Tensor:
        return _OnGrid.apply(x, *self.grid(x), *self.bounds)  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def codes(self, x: Tensor) -> Codes:
        """Integer codes lowest..highest; values = (codes - zero) * step."""
        x = x.float()
        step, zero = self.grid(x)
        codes = ranges.codes(x, step, zero).clamp_(*self.bounds)
        return Codes("affine", codes.to(torch.int32), {"step": step.clone(), "zero": zero.clone()})

    @property
    def levels(self) -> int:
        return self.bounds[1] - self.bounds[0] + 1

    def stored_bits(self, weight: Tensor) -> tuple[float, float]:
        """Codes of `bits` bits; a float step and, when affine, a zero point of `bits` bits per channel or tensor."""
        scales = weight.shape[0] if self.per_channel else 1
        return float(weight.numel() * self.bits), float(scales * (32 + (0 if self.symmetric else self.bits)))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"symmetric": self.symmetric}


class Uniform(UniformGrid):
    """A uniform grid over a range found once, from the weight or the calibration images, and then held.

    Exact minima and maxima are kept over all batches, and for the other ranges the 32 smallest and largest values of
    each batch. Of the rest they see a random sample (drawn with a fixed seed, at most 2^20 values, 2^16 of the first
    batch), each value of which counts for as many as it was drawn from. A weight is seen whole. Before calibration the
    range is -1..1.

    Args:
        range: minmax | percentile | mse | kl (see qbench.quant.ranges)
        percentile: for range=percentile, in percent
        others: as UniformGrid

    Raises:
        ValueError: an argument out of range

    Reference: 1806.08342 Sec. 3 (minmax); ranges.py for the others
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
        range: str = "minmax",
        percentile: float = 99.99,
    ) -> None:
        super().__init__(layer, site, bits=bits, symmetric=symmetric, restricted=restricted, per_channel=per_channel)
        self.range = check_choice("range", range, ranges.KINDS)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
        self.percentile = percentile
        for name in ("lo", "hi", "step", "zero"):
            self.register_buffer(name, torch.ones(self.shape))
        self._set_range(-torch.ones(self.shape), torch.ones(self.shape))
        self._seen: list[Tensor] = []
        self._tails: list[Tensor] = []
        self._extremes: tuple[Tensor, Tensor] | None = None
        self._forget()

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.step, self.zero

    def kernel(self, shape: torch.Size) -> Kernel | None:
        if self.per_channel:
            return None
        lo, hi = self.bounds
        return Kernel("grid", self.step.item(), lo=lo, hi=hi, zero=self.zero.item())

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Take in the weight, or one batch of activations."""
        x = self.rows(x.detach().float())
        lo, hi = ranges.minmax(x)
        if self._extremes is not None:
            lo, hi = torch.minimum(lo, self._extremes[0]), torch.maximum(hi, self._extremes[1])
        self._extremes = lo, hi
        if self.range == "minmax":
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
        self._set_signed(self.symmetric and (self.site == "weight" or bool((lo < 0).any())))
        x, weights = torch.stack([lo, hi], -1), None
        if self._seen:
            x = torch.cat([*self._seen, *self._tails])
        if self._tails:
            drawn = x.numel() - sum(t.numel() for t in self._tails)
            weights = torch.ones(x.numel(), device=x.device)
            weights[drawn:] = self._share or 1.0
        lo, hi = ranges.find(
            self.range,
            x,
            bits=int(self.bits),
            symmetric=self.symmetric,
            restricted=self.restricted,
            signed=self.signed,
            percent=self.percentile,
            weights=weights,
        )
        self._set_range(lo, hi)
        self._forget()

    def _set_signed(self, signed: bool) -> None:
        self.signed = signed
        self.bounds = ranges.code_bounds(int(self.bits), self.symmetric, self.restricted, signed)

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "signed": self.signed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self._set_signed(state.get("signed", self.symmetric))  # older files have none: their symmetric codes are signed

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
