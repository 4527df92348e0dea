"""Competitive binary nets from scratch: signs without scales, a wide straight-through window. arXiv 1812.01965"""

from typing import Any

from torch import Tensor

from qbench.methods.shared.binary import Slope, mean_magnitude
from qbench.quant.grid import Planes, signs
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer, check_bits


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

    def grid(self, x: Tensor | None = None) -> Planes:
        if not self.scale:
            return signs(1.0)
        return signs(None if x is None else mean_magnitude(x.detach()))
