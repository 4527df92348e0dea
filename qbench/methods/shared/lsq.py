"""LSQ: Learned Step Size Quantization (arXiv 1902.08153)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant import ops
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Kernel, Quantizer, check_bits, check_choice

SMALLEST = 1e-6  # the step is read as at least this: the optimizer may carry it to 0 or below


@ops.formula
def _quantize(x: Tensor, step: Tensor, lo: int, hi: int) -> Tensor:
    s = step.clamp_min(SMALLEST)
    return (x.float() / s).clamp_(lo, hi).round_().mul_(s).to(x.dtype)


@ops.formula
def _quantize_backward(g: Tensor, x: Tensor, step: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    z = (x.float() / step.clamp_min(SMALLEST)).clamp_(lo, hi)
    wide = g.float()
    dx = torch.ops.aten.hardtanh_backward(wide, z, lo, hi)  # g where lo < z < hi, else 0
    return dx.to(g.dtype), z.round().mul_(wide).addcmul_(dx, z, value=-1).sum()


class _Quantize(torch.autograd.Function):
    """The backward computes x / step again, which takes no time, rather than keep tensors as large as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, scale: float) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.bounds, ctx.scale = (lo, hi), scale
        return _quantize(x, step, lo, hi)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dstep = _quantize_backward(grads[0], *ctx.saved_tensors, *ctx.bounds)
        return dx, dstep * ctx.scale, None, None, None


class LSQ(Quantizer):
    """A uniform grid whose step is learned, one per tensor, for weights and inputs.

    x_hat = s round(clip(x / s, -Q_N, Q_P)). Signed (weights): Q_N = 2^(bits-1), Q_P = 2^(bits-1) - 1; unsigned: 0 and
    2^bits - 1. s starts at 2 mean|x| / sqrt(Q_P), and is read as at least 1e-6. Any shape, batch first.
    Gradient: dx_hat/dx = 1 for -Q_N < x/s < Q_P, else 0; dx_hat/ds = round(x/s) - x/s there, -Q_N below, Q_P above,
    summed over the tensor and multiplied by 1 / sqrt(N Q_P). N: the weights of the layer; for inputs the features of
    one image, as in the paper, or all values of the step's batch, however many micro-batches and workers share it.

    Departures: an input that turns out negative during calibration (the image, the output of a linear bottleneck) gets
    the signed grid, where the paper's inputs all follow a ReLU. mean|x| is over all calibration images, not the first
    batch.

    Args:
        bits: 2..16
        count: what N is for inputs, 'features' | 'numel' (batch included: a gradient sqrt(batch) times smaller)

    Raises:
        ValueError: an argument out of its range

    Reference: 1902.08153 Sec. 2
    """

    casts = True

    def __init__(self, layer: nn.Module, site: str, *, bits: int, count: str = "features") -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 16)
        self.is_weight = site == "weight"
        self.signed = self.is_weight
        self.count = check_choice("count", count, ("features", "numel"))
        self.step = nn.Parameter(torch.ones(()))
        self._total, self._seen = 0.0, 0

    @property
    def bounds(self) -> tuple[int, int]:
        """(-Q_N, Q_P)."""
        half = 2 ** (int(self.bits) - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self._total += float(x.float().abs().sum(dtype=torch.float64))
        self._seen += x.numel()
        self.signed = self.signed or bool((x < 0).any())

    @torch.no_grad()
    def finish_calibration(self) -> None:
        if self._total > 0:  # else the tensor is all zeros, and any step does
            self.step.fill_(2 * self._total / self._seen / math.sqrt(self.bounds[1]))
        self._total, self._seen = 0.0, 0

    def slope(self, shape: torch.Size) -> float:
        """1 / sqrt(N Q_P): the factor of the step's gradient, for an input of this shape."""
        n = shape.numel() if self.is_weight else shape[1:].numel()
        if self.count == "numel" and not self.is_weight:
            n = shape.numel() * math.prod(self.pieces)
        return 1 / math.sqrt(n * self.bounds[1])

    def quantize(self, x: Tensor) -> Tensor:
        return _Quantize.apply(x, self.step, *self.bounds, self.slope(x.shape))  # type: ignore[no-any-return, no-untyped-call]

    def kernel(self, shape: torch.Size) -> Kernel:
        lo, hi = self.bounds
        return Kernel("learned", max(self.step.item(), SMALLEST), (self.step,), lo=lo, hi=hi, slope=self.slope(shape))

    def grid(self, x: Tensor | None = None) -> Affine:
        """Codes -Q_N..Q_P with the learned step."""
        return affine(self.step.detach().clamp_min(SMALLEST), *self.bounds)

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "signed": self.signed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.signed = state["signed"]
