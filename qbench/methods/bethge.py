"""Competitive binary nets from scratch: signs without scales, a wide straight-through window. arXiv 1812.01965"""

from typing import Any

import torch
from torch import Tensor

from qbench.methods.shared.binary import Slope, mean_magnitude
from qbench.quant import ops
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Codes, Quantizer, check_bits


class SignWeight(Quantizer):
    """w_hat = sign(w), +1 at 0, or mean|w| sign(w) of each output channel where `scale` is set.

    The gradient is g * 1[|w| <= clip] (or another of the slopes of `Slope`), times the scale, a constant in it. The
    paper finds that trained from scratch, with a batch-norm behind each conv, scales do not help.

    Errors: ValueError on bits other than 1, an unknown gradient, clip not above 0.
    Reference: arXiv 1812.01965, Sec. 3
    """

    granularity = "per_channel"

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 1,
        gradient: str = "clipped",
        clip: float = 1.3,
        scale: bool = False,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.slope, self.scale = Slope(gradient, clip=clip), scale

    def quantize(self, x: Tensor) -> Tensor:
        y = self.slope.sign(x)
        return y * mean_magnitude(x.detach()) if self.scale else y

    def alike(self) -> Any:
        return self.slope.alike(), self.scale

    def codes(self, x: Tensor) -> Codes:
        """One plane of -1 and +1; its coefficient is 1 or mean|w|."""
        w = x.detach().float()
        alpha = mean_magnitude(w) if self.scale else torch.ones((), device=w.device)
        return Codes("planes", ops.sign_value(w).to(torch.int8)[None], {"coefficients": alpha[None]})

    def stored_bits(self, weight: Tensor) -> tuple[float, float]:
        return float(weight.numel()), 32.0 * weight.shape[0] * self.scale
