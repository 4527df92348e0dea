"""WRPN's weights (arXiv 1709.01134); its activations are DoReFa's, and its nets are wider ones."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.quant.grid import Affine, affine
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer, check_bits, check_choice


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bound: Tensor, n: int, masked: bool) -> Tensor:
        z = w / bound
        ctx.save_for_backward(*((z.abs() <= 1,) if masked else ()))
        return z.clamp_(-1, 1).mul_(n).round_().mul_(bound / n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        g = grads[0] * ctx.saved_tensors[0] if ctx.saved_tensors else grads[0]
        return g, None, None, None


class WRPNWeight(Quantizer):
    """w_hat = bound round(n clip(w / bound, -1, 1)) / n, n = 2^(bits - 1) - 1: one bit is the sign, 0 is a level.

    Gradient: 1, or with `clip_gradient` 1[|w| <= bound]. Any shape, one constant bound per tensor.

    Departure: the paper's bound is 1 (`unit`). Weights as nets have them are far smaller: with 2 bits all below 0.5
    become 0, and a layer that is 0 throughout learns nothing. `fit` is the bound of least squared error for the weight
    that training begins with; where batch-norm follows, it is the same net with weights measured in another unit.

    Args:
        bits: 2..16; the paper's special way with one bit was not seen
        bound: 'fit' | 'unit'
        clip_gradient: see above

    Raises:
        ValueError: an argument out of its range

    Reference: arXiv 1709.01134 (its formulas as Distiller's documentation has them)
    """

    bound: Tensor

    def __init__(
        self, layer: QuantLayer, site: str, *, bits: int, bound: str = "fit", clip_gradient: bool = False
    ) -> None:
        super().__init__()
        self.bits = width = check_bits(bits, 2, 16)
        self.n = 2 ** (width - 1) - 1
        self.fitted = check_choice("bound", bound, ("fit", "unit")) == "fit"
        self.clip_gradient = clip_gradient
        self.register_buffer("bound", torch.ones(()))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """The best of 64 shares of the largest magnitude."""
        if self.fitted and (largest := x.abs().max()) > 0:
            tries = largest * torch.linspace(1 / 64, 1, 64, device=x.device)
            errors = [(_Clipped.apply(x, b, self.n, False) - x).square().sum() for b in tries]  # type: ignore[no-untyped-call]
            self.bound.copy_(tries[torch.stack(errors).argmin()])

    def quantize(self, x: Tensor) -> Tensor:
        return _Clipped.apply(x, self.bound, self.n, self.clip_gradient)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Affine:
        return affine(self.bound / self.n if self.fitted else 1 / self.n, -self.n, self.n)
