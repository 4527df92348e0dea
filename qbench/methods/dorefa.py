"""DoReFa-Net's gradients (arXiv 1606.06160); weights and activations are in shared, as other papers use them."""

import torch
from torch import Tensor, nn

from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Quantizer, check_bits


class DoReFaError(Quantizer):
    """The gradient of a conv's output on 2^bits levels per image, with noise of one level: unbiased.

    g_hat = 2 m (Q(g / (2 m) + 1/2 + u / n) - 1/2), m = max|g| over all axes except the batch, Q(r) = round(n r) / n,
    n = 2^bits - 1, u ~ U(-1/2, 1/2) in training and 0 in eval mode. r is clipped to [0, 1] after the noise, as in the
    authors' code. No level is 0: a zero in an image whose m is not 0 becomes +-m / n; an image whose m is 0 stays 0.

    Args:
        bits: 1..16

    Raises:
        ValueError: bits out of range

    Reference: 1606.06160 Sec. 2.5
    """

    granularity = "per_image"

    def __init__(self, layer: nn.Module, site: str, *, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 16)
        self.n = 2**self.bits - 1

    def quantize(self, x: Tensor) -> Tensor:
        m = _largest(x)
        z = (x / m.clamp_min(torch.finfo(x.dtype).tiny)).add_(1).mul_(self.n / 2)
        if self.training:
            z += torch.rand(x.shape, generator=self.generator, device=x.device, dtype=x.dtype).sub_(0.5)
        return z.clamp_(0, self.n).round_().sub_(self.n / 2).mul_(m * (2 / self.n))

    def grid(self, x: Tensor | None = None) -> Affine:
        """Codes 0..n, zero n/2, and one step of 2 m / n per image."""
        return affine(None if x is None else _largest(x) * (2 / self.n), 0, self.n, zero=self.n / 2)


def _largest(x: Tensor) -> Tensor:
    """m of each image, [N, 1, ...]."""
    return x.detach().abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)
