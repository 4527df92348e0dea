"""QIL: quantization intervals learned from the task's loss (arXiv 1808.05779)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.methods.shared.ladder import Progressive
from qbench.methods.shared.sample import Sample
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Rectifier

SMALLEST = 1e-6  # the half width is read as at least this
LEAST_GAMMA = 1e-2  # and gamma as at least this: the optimizer may carry both to 0 or below


def _place(size: Tensor, center: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha size + beta, not yet clipped; c; d)."""
    d = width.clamp_min(SMALLEST)
    c = torch.maximum(center, d)
    return (size - c) * (0.5 / d) + 0.5, c, d


class _Interval(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        center: Tensor,
        width: Tensor,
        gamma: Tensor | None,
        scale: Tensor,
        n: int,
        signed: bool,
        factor: float,
    ) -> Tensor:
        ctx.save_for_backward(x, center, width, gamma, scale)
        ctx.signed, ctx.factor = signed, factor
        u = _place(x.abs() if signed else x, center, width)[0].clamp_(0, 1)
        u = u if gamma is None else u.pow_(gamma.clamp_min(LEAST_GAMMA))
        y = u.mul_(n).round_().mul_(scale / n)  # the product that the grid has
        return y.mul_(x.sign()) if signed else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, center, width, gamma, scale = ctx.saved_tensors
        size = x.abs() if ctx.signed else x
        u, c, d = _place(size, center, width)
        inside = (u > 0) & (u <= 1)
        g = grads[0] * scale * inside
        dgamma = None
        if gamma is not None:
            e, u = gamma.clamp_min(LEAST_GAMMA), torch.where(inside, u, 1.0)
            power = u.pow(e - 1)
            dgamma = (g * x.sign() * power * u * u.log()).sum() * ctx.factor
            g = g * e * power
        g = g * (0.5 / d)
        along = -g * x.sign() if ctx.signed else -g
        return g, along.sum() * ctx.factor, (along * (size - c)).sum() / d * ctx.factor, dgamma, None, None, None, None


class QIL(Progressive, Rectifier):
    """An interval of magnitudes, [c - d, c + d], on equal steps: what lies below is pruned, what lies above clipped.

    t = 0 for |w| < c - d, sign(w) for |w| > c + d, else (alpha |w| + beta)^gamma sign(w), with alpha = 0.5 / d and
    beta = 0.5 - 0.5 c / d; w_hat = scale round(t n) / n, n = 2^(bits - 1) - 1. Inputs: the same without the sign, with
    gamma = 1 and n = 2^bits - 1; where calibration meets values below 0, of which the paper knows none, like weights.
    One c and d (and gamma, of weights) per tensor, learned. Any shape.

    Gradient: that of t, times `scale`; the round's is 1. With u = alpha |w| + beta and v = gamma u^(gamma - 1), where
    0 < u <= 1: dt/dw = alpha v, dt/dc = -alpha v sign(w), dt/dd = -alpha v sign(w) (|w| - c) / d, dt/dgamma = u^gamma
    ln(u) sign(w); all 0 elsewhere, at u = 0 too, where v may be infinite. Those of c, d and gamma are summed, and
    multiplied by `gradient_scale`. d is read as at least 1e-6, c as at least d, gamma as at least 0.01.

    Where it starts is not known: c = d, an interval from 0 to the end of least squared error.

    Departure: the paper's weights lie in -1..1 and its inputs in 0..1, and batch-norm does the rest. From a float net
    `scale` is the constant that fits w_hat to the tensor, so that the running statistics of batch-norm hold; with
    rescale=False or init='scratch' it is 1.

    Args:
        bits: 2..16
        gamma: whether weights have a learned exponent, which starts at 1
        gradient_scale: a number, or 'lsq' for LSQ's 1 / sqrt(N n), N the weights of a layer or an image's features
        rescale, init: see above

    Raises:
        ValueError: bits or gradient_scale out of range

    Reference: arXiv 1808.05779 (an account of it; its text was not seen)
    """

    idempotent = False  # 0.5 of a grid is another place in the interval
    scale: Tensor

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        gamma: bool = False,
        gradient_scale: float | str = 0.01,
        rescale: bool = True,
        init: str = "float",
    ) -> None:
        super().__init__(layer, site)
        self.ask(bits, 2, 16)
        self.is_weight = self.signed = site == "weight"
        if gradient_scale != "lsq" and not (isinstance(gradient_scale, float | int) and gradient_scale > 0):
            raise ValueError(f"gradient_scale must be a number above 0, or lsq, got {gradient_scale!r}")
        self.gradient_scale, self.fitted = gradient_scale, rescale and init != "scratch"
        self.center, self.width = (nn.Parameter(torch.full((), 0.5)) for _ in range(2))
        self.gamma = nn.Parameter(torch.ones(())) if gamma and self.signed else None
        self.register_buffer("scale", torch.ones(()))
        self._sample = Sample()

    @property
    def n(self) -> int:
        """The code of c + d."""
        return int(2 ** (self.bits - self.signed)) - 1

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        super().calibrate(x)
        self._sample.add(x)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """The end of least squared error among 64 shares of the largest magnitude, the scale fitted to each."""
        x = self._sample.take()
        if x is None or not (largest := x.abs().max()) > 0:
            return
        best = torch.inf
        for half in largest * torch.linspace(1 / 128, 0.5, 64, device=x.device):
            t = _Interval.apply(x, half, half, None, x.new_ones(()), self.n, self.signed, 1.0)  # type: ignore[no-untyped-call]
            share = (x * t).sum() / (t * t).sum().clamp_min(torch.finfo(t.dtype).tiny)
            if (error := float((share * t - x).square().sum())) < best:
                best = error
                self.center.copy_(half)
                self.width.copy_(half)
                if self.fitted:
                    self.scale.copy_(share)

    def factor(self, shape: torch.Size) -> float:
        """What the gradients of c, d and gamma are multiplied by, for a tensor of this shape."""
        if isinstance(self.gradient_scale, str):
            return 1 / math.sqrt((shape if self.is_weight else shape[1:]).numel() * self.n)
        return float(self.gradient_scale)

    def quantize(self, x: Tensor) -> Tensor:
        learned = self.center, self.width, self.gamma, self.scale
        return _Interval.apply(x, *learned, self.n, self.signed, self.factor(x.shape))  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Affine:
        return affine(self.scale / self.n if self.fitted else 1 / self.n, -self.n if self.signed else 0, self.n)
