"""Quantizers onto two values that two papers or more use: scaled signs of weights, signs of inputs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench import ops
from qbench.layers import QuantLayer
from qbench.quantizer import Codes, Quantizer, check_bits, check_choice

GRADIENTS = ("paper", "exact", "constant_alpha", "released")


def mean_magnitude(w: Tensor) -> Tensor:
    """mean|w| of each output channel, [out, 1, ...]; in float64, so that the mean of equal values is that value."""
    return w.abs().mean(tuple(range(1, w.dim())), keepdim=True, dtype=torch.float64).to(w.dtype)


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, gradient: str) -> Tensor:
        alpha = mean_magnitude(w)
        ctx.save_for_backward(w, alpha)
        ctx.gradient = gradient
        return alpha * ops.sign_value(w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        w, alpha = ctx.saved_tensors
        g, n = grads[0], w[0].numel()
        if ctx.gradient == "released":
            return g * (1 / n + alpha * (w.abs() < 1)) * (n * (1 - 1 / w.shape[1])), None
        through_sign = g * alpha * (w.abs() <= 1)
        if ctx.gradient == "paper":
            return g / n + through_sign, None
        if ctx.gradient == "exact":
            s = ops.sign_value(w)
            return s * (g * s).mean(tuple(range(1, w.dim())), keepdim=True) + through_sign, None
        return through_sign, None


class BinaryWeight(Quantizer):
    """w_hat = alpha * sign(w) with alpha = mean|w| of each output channel, the least-squares scale; sign(0) = +1.

    The gradient, with g = dL/dw_hat, n weights per output channel and c input channels, is one of
      paper:          g_i * (1/n + alpha * 1[|w_i| <= 1])
      exact:          sign(w_i)/n * sum_j g_j sign(w_j) + alpha * g_i * 1[|w_i| <= 1]    alpha depends on all weights
      constant_alpha: alpha * g_i * 1[|w_i| <= 1]
      released:       n * (1 - 1/c) * g_i * (1/n + alpha * 1[|w_i| < 1])    the authors' Torch code, for SGD
    For Adam that code multiplies by 1e9 instead of n, to which Adam is blind: it only drowns the weight decay.

    Weight: [out, in, ...].

    Errors: ValueError on bits other than 1, an unknown gradient, `released` with one input channel.
    Reference: arXiv 1603.05279, Sec. 3.1, Eq. 6 and Algorithm 1
    """

    granularity = "per_channel"

    def __init__(self, layer: QuantLayer, site: str, *, bits: float = 1, gradient: str = "paper") -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.gradient = check_choice("gradient", gradient, GRADIENTS)
        if gradient == "released" and layer.weight.shape[1] == 1:
            raise ValueError("gradient=released is 0 for a layer with one input channel, as its factor is 1 - 1/c")

    def quantize(self, x: Tensor) -> Tensor:
        return _ScaledSign.apply(x, self.gradient)  # type: ignore[no-any-return, no-untyped-call]

    def codes(self, x: Tensor) -> Codes:
        """One plane of -1 and +1, with alpha as its coefficient."""
        w = x.detach().float()
        return Codes("planes", ops.sign_value(w).to(torch.int8)[None], {"coefficients": mean_magnitude(w)[None]})

    def stored_bits(self, weight: Tensor) -> tuple[float, float]:
        return float(weight.numel()), 32.0 * weight.shape[0]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"gradient": self.gradient}


class Sign(Quantizer):
    """x_hat = sign(x), +1 at 0; gradient 1[|x| < 1], or 1[|x| <= 1] where `inclusive`.

    Errors: ValueError on bits other than 1.
    Reference: arXiv 1603.05279, Sec. 3.2 (open interval, as in the authors' code); 1602.02830, Eq. 4 (closed)
    """

    def __init__(self, layer: QuantLayer, site: str, *, bits: float = 1, inclusive: bool = False) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.inclusive = inclusive

    def quantize(self, x: Tensor) -> Tensor:
        return ops.sign_clipped(x, self.inclusive)
