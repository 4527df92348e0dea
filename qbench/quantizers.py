"""Quantizers that two papers or more use."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench import ops
from qbench.quantizer import Codes, Quantizer, check_bits


class _DoReFaWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, n: int, scale: Tensor, detach: bool) -> Tensor:
        t = w.tanh()
        m = t.abs().amax().clamp_min(1e-8)  # an all-zero weight must not divide by 0
        ctx.save_for_backward(t, m, scale)
        ctx.detach = detach
        return ((t / (2 * m) + 0.5) * n).round_().mul_(2 * scale / n).sub_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        t, m, scale = ctx.saved_tensors
        g = grads[0] * (scale / m)
        if not ctx.detach:
            top = t.abs() == m
            g = g - top * t.sign() * ((g * t).sum() / m / top.sum().clamp_min(1))
        return g * (1 - t * t), None, None, None


class DoReFaWeight(Quantizer):
    """DoReFa weights, per layer; also the weights of PACT.

    bits = 1: w_hat = sign(w) * mean|w| with sign(0) = +1, gradient 1 (the mean is a constant).
    bits > 1: w_hat = scale * (2 Q(tanh(w) / (2 m) + 1/2) - 1), m = max|tanh(w)|, Q(r) = round(n r) / n, n = 2^bits - 1.
    The gradient of Q's round is 1; it flows through tanh and through the division by m: with g = dL/dw_hat,
    dL/dw = scale (1 - tanh^2 w) / m * (g - 1[w is the arg-max] sign(w) sum(g tanh w) / m), the last term shared evenly
    among ties. 2^bits levels, none of them 0. Any shape.

    Departure: scale is 1 in the paper and here with init='scratch'. From a float net it is the constant that fits w_hat
    to the float weight in least squares, so that the running statistics of the following batch-norm, and the ranges
    calibrated behind it, are those of the float net. Batch-norm cancels it: dL/dw is the same for any scale.

    Args:
        bits: 1..16
        detach: treat m as a constant in the gradient, as several ports do
        init: 'scratch' for scale = 1, anything else to fit it to the weight

    Raises:
        ValueError: bits out of range

    Reference: 1606.06160 Eq. 7 and 9; 1805.06085 Sec. 5
    """

    idempotent = False  # tanh / max of a quantized weight is not the value it was quantized to

    scale: Tensor

    def __init__(
        self, layer: nn.Module, site: str, *, bits: int, detach: bool = False, init: str | None = "scratch"
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 16)
        self.detach = detach
        self.init = init
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        if self.bits > 1 and self.init != "scratch":
            w, hat = x.float(), self(x.float())
            self.scale.copy_(self.scale * (w * hat).sum() / (hat * hat).sum())

    def quantize(self, x: Tensor) -> Tensor:
        if self.bits == 1:
            return ops.straight_through(x, ops.sign_value(x) * x.abs().mean())
        return _DoReFaWeight.apply(x, self.levels - 1, self.scale, self.detach)  # type: ignore[no-any-return]

    def codes(self, x: Tensor) -> Codes:
        """Codes 0..n; values = (codes - n/2) * step."""
        x, n = x.detach().float(), self.levels - 1
        scale = x.abs().mean() if self.bits == 1 else self.scale
        codes = x >= 0 if self.bits == 1 else (self(x) / (2 * scale / n) + n / 2).round()
        return Codes(
            "affine", codes.to(torch.int32), {"step": 2 * scale / n, "zero": torch.tensor(n / 2, device=x.device)}
        )

    def stored_bits(self, weight: Tensor) -> tuple[float, float]:
        has_scale = self.bits == 1 or float(self.scale) != 1
        return float(weight.numel() * self.bits), 32.0 * has_scale
