"""ReActNet: sign and PReLU with learned shifts, two-step training, a loss from a teacher. arXiv 2003.03488"""

import torch
from torch import Tensor, nn

from qbench.methods.shared.binary import Slope
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Kernel, Quantizer, check_bits


def _shaped(values: Tensor, x: Tensor) -> Tensor:
    """[C] against [N, C, ...]."""
    return values.view(-1, *[1] * (x.dim() - 2))


class RSign(Quantizer):
    """x_hat = sign(x - alpha), alpha learned for each input channel, 0 at first; +1 at 0.

    The gradient of x is g * slope(x - alpha), by default max(0, 2 - 2 |x - alpha|); that of alpha is its negative,
    summed over its channel. Input: [N, C, ...].

    Errors: ValueError on bits other than 1, an unknown gradient.
    Reference: arXiv 2003.03488, Eq. 1 and 5-6
    """

    idempotent = False  # a threshold beyond 1 makes both signs equal

    def __init__(self, layer: QuantLayer, site: str, *, bits: float = 1, gradient: str = "polynomial") -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.slope = Slope(gradient)
        self.alpha = nn.Parameter(torch.zeros(layer.weight.shape[1] * getattr(layer, "groups", 1)))

    def quantize(self, x: Tensor) -> Tensor:
        return self.slope.sign(x - _shaped(self.alpha, x))

    def kernel(self, shape: torch.Size) -> Kernel:
        return self.slope.kernel(self.alpha)


class RPReLU(nn.Module):
    """y = max(x - gamma, 0) + beta * min(x - gamma, 0) + zeta, all three learned for each channel, in place of a ReLU.

    gamma and zeta are 0 at first, beta 0.25. At x = gamma the gradient is that of the left side, beta. [N, C, ...] ->
    the same.

    Reference: arXiv 2003.03488, Eq. 2 and 7-9
    """

    def __init__(self, module: nn.Module, site: str, *, channels: int) -> None:
        super().__init__()
        self.gamma, self.zeta = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        u = x.float() - _shaped(self.gamma, x)
        return (torch.where(u > 0, u, _shaped(self.beta, x) * u) + _shaped(self.zeta, x)).to(x.dtype)

    def kernel(self, shape: torch.Size) -> Kernel:
        return Kernel("prelu", trained=(self.gamma, self.beta, self.zeta))
