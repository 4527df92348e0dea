"""DSQ: differentiable soft quantization, whose steps are made of tanh in the backward pass (arXiv 1908.05033)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.methods.shared.sample import Sample
from qbench.quant import ops, ranges
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Quantizer, check_bits

SMALLEST = 1e-6  # the step is read as at least this
SHARPEST, SOFTEST = 0.01, 0.95  # alpha is read as within these: at 0 the slope is infinite, at 1 the curve is a line


def _place(x: Tensor, lo: Tensor, hi: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(place of x on 0..n, step)."""
    step = ((hi - lo) / n).clamp_min(SMALLEST)
    return ((x.float() - lo) / step).clamp_(0, n), step


@ops.formula
def _hard(x: Tensor, lo: Tensor, hi: Tensor, n: int) -> Tensor:
    z, step = _place(x, lo, hi, n)
    return z.add_(0.5).floor_().clamp_max_(n).mul_(step).add_(lo).to(x.dtype)


@ops.formula
def _soft_backward(
    g: Tensor, x: Tensor, lo: Tensor, hi: Tensor, alpha: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = alpha.clamp(SHARPEST, SOFTEST)
    kappa, s = (2 / a - 1).log(), 1 / (1 - a)
    z, step = _place(x, lo, hi, n)
    code = (z + 0.5).floor().clamp_max(n)
    below, above = x.float() < lo, x.float() > hi
    wide = g.float()
    inside = wide.masked_fill(below | above, 0)
    f = z - z.floor().clamp_max(n - 1) - 0.5  # place within the step, -0.5..0.5
    t = (kappa * f).tanh()
    bend = 1 - t * t
    dx = inside * bend * (0.5 * s * kappa)
    along = (inside * code - dx * z).sum() / n
    dlo = (inside - dx).sum() - along + (wide * below).sum()
    dhi = along + (wide * above).sum()
    dalpha = (inside * (t * (s * s) - bend * f * (2 * s / (a * (2 - a))))).sum() * (step / 2)
    return dx.to(g.dtype), dlo, dhi, dalpha


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: Tensor, hi: Tensor, alpha: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(x, lo, hi, alpha)
        ctx.n = n
        return _hard(x, lo, hi, n)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_soft_backward(grads[0], *ctx.saved_tensors, ctx.n), None


class DSQ(Quantizer):
    """2^bits equal steps between learned bounds, l and u; forward hard, backward along a curve of tanh pieces.

    Forward: Q(x) = l + D round((clip(x, l, u) - l) / D), D = (u - l) / n, n = 2^bits - 1, half a step up.
    Backward: Q_S(x) = l + D (i + (phi(x) + 1) / 2) for x in the i-th step, phi(x) = tanh(k (x - m_i)) / (1 - alpha),
    m_i = l + (i + 1/2) D, k = ln(2 / alpha - 1) / D: the closer alpha is to 0, the closer Q_S is to Q. sgn, which makes
    Q of Q_S, has gradient 1. With z = (x - l) / D, c the code of x, K = k D, t = phi (1 - alpha) and S =
    K (1 - t^2) / (2 (1 - alpha)), for l <= x <= u:
      dQ/dx = S;  dQ/du = (c - S z) / n;  dQ/dl = 1 - S - (c - S z) / n
      dQ/dalpha = D/2 (t / (1 - alpha)^2 - 2 (1 - t^2) (z - i - 1/2) / (alpha (2 - alpha) (1 - alpha)))
    Outside dQ/dx = dQ/dalpha = 0, dQ/dl = 1 below l, dQ/du = 1 above u. Those of l, u and alpha are summed over the
    tensor. Any shape, one of each per tensor. D is read as at least 1e-6, alpha as within 0.01..0.95.

    Where the bounds start is not known. Weights: mean -+ 2.6 standard deviations, as in MQBench; inputs: the range of
    least squared error over the calibration images, which may have values of both signs.

    Args:
        bits: 1..8
        alpha: where it starts, in 0.01..0.95
        learn_alpha: whether it is trained; its weight decay is what keeps it small
        learn_range: whether l and u are trained

    Raises:
        ValueError: bits or alpha out of range

    Reference: arXiv 1908.05033 (accounts of it; its text was not seen)
    """

    casts = True

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        alpha: float = 0.2,
        learn_alpha: bool = True,
        learn_range: bool = True,
    ) -> None:
        super().__init__()
        self.bits = width = check_bits(bits, 1, 8)
        if not SHARPEST <= alpha <= SOFTEST:
            raise ValueError(f"alpha must be in {SHARPEST}..{SOFTEST}, got {alpha}")
        self.n, self.site = 2**width - 1, site
        self.lo, self.hi = (self._number(v, learn_range) for v in (-1.0 if site == "weight" else 0.0, 1.0))
        self.alpha = self._number(alpha, learn_alpha)
        self._sample = Sample()

    @staticmethod
    def _number(value: float, learned: bool) -> nn.Parameter:
        return nn.Parameter(torch.tensor(float(value)), requires_grad=learned)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self._sample.add(x)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        if (x := self._sample.take()) is None or not x.any():
            return
        lo, hi = ranges.find("mse", x, bits=int(self.bits), symmetric=False)
        if self.site == "weight":
            std, mean = torch.std_mean(x)
            lo, hi = (mean - 2.6 * std, mean + 2.6 * std) if std > 0 else (lo, hi)
        self.lo.copy_(lo)
        self.hi.copy_(hi)

    def quantize(self, x: Tensor) -> Tensor:
        return _Soft.apply(x, self.lo, self.hi, self.alpha, self.n)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Affine:
        step = ((self.hi - self.lo).detach() / self.n).clamp_min(SMALLEST)
        return affine(step, 0, self.n, offset=self.lo)
