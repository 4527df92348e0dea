"""IR-Net: balanced, standardized binary weights with shift scales, and a gradient that sharpens. arXiv 1909.10788"""

from typing import Any

import torch
from torch import Tensor

from qbench.methods.shared.binary import Slope
from qbench.quant.grid import Planes, signs
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer, check_bits


def standardize(w: Tensor) -> Tensor:
    """(w - mean) / std of each output channel, std with n - 1 in its denominator; the gradient flows through both."""
    dims = tuple(range(1, w.dim()))
    centred = w - w.mean(dims, keepdim=True)
    # a channel of equal weights has no direction: its std is kept from 0
    return centred / centred.std(dims, keepdim=True).clamp_min(1e-8)


class LibraWeight(Quantizer):
    """w_hat = sign(z) * 2^s, z = (w - mean) / std of each output channel, s = round(log2(mean|z|)); sign(0) = +1.

    The scale is a shift and a constant in the gradient; the sign has the gradient of `Slope`, which flows on through
    the standardization. With `shift` off the scale is mean|z| itself, the least-squares scale without the rounding.

    Weight: [out, in, ...], at least two weights per output channel.

    Errors: ValueError on bits other than 1, an unknown gradient, one weight per output channel.
    Reference: arXiv 1909.10788, Sec. 3.2, Eq. 5-7
    """

    granularity = "per_channel"
    idempotent = False  # a quantized channel is not balanced

    def __init__(
        self, layer: QuantLayer, site: str, *, bits: float = 1, gradient: str = "tanh", shift: bool = True
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.slope, self.shift = Slope(gradient), shift
        if layer.weight[0].numel() < 2:
            raise ValueError("IR-Net standardizes each output channel and needs at least two weights in it, got 1")

    def scale(self, z: Tensor) -> Tensor:
        """2^s of each output channel of standardized weights, [out, 1, ...]; no gradient."""
        magnitude = z.detach().abs().mean(tuple(range(1, z.dim())), keepdim=True).clamp_min(2.0**-20)
        return torch.exp2(magnitude.log2().round()) if self.shift else magnitude

    def quantize(self, x: Tensor) -> Tensor:
        z = standardize(x)
        return self.slope.sign(z) * self.scale(z)

    def alike(self) -> Any:
        return self.slope.alike(), self.shift

    def grid(self, x: Tensor | None = None) -> Planes:
        return signs(None if x is None else self.scale(standardize(x.detach())))
