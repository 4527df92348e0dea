"""DoReFa-Net, activations and gradients (arXiv 1606.06160); its weights are in shared/dorefa_weight.py."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant import ops
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Kernel, Quantizer, Rectifier, check_bits, check_choice


@ops.formula
def _bounded(x: Tensor, n: int, bound: str) -> tuple[Tensor, Tensor]:
    """(x_hat, its gradient)."""
    z = x.float()
    if bound == "abs":
        slope = z.sign().masked_fill_(z.abs() > 1, 0).to(torch.int8)
        y = z.abs().clamp_max_(1)
    else:
        slope = (z >= 0) & (z <= 1)
        y = z.clamp(0, 1)
    return y.mul_(n).round_().div_(n).to(x.dtype), slope


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, bound: str) -> Tensor:
        y, slope = _bounded(x, n, bound)
        ctx.save_for_backward(slope)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


class DoReFaActivation(Rectifier):
    """In place of a ReLU: x bounded to [0, 1], then on 2^bits levels: x_hat = round(n h(x)) / n, n = 2^bits - 1.

    h(x) = clip(x, 0, 1), or min(1, |x|). Gradient: 1 on 0 <= x <= 1, else 0; for min(1, |x|) sign(x) on |x| <= 1 (0 at
    0), else 0. One bit gives 0 and 1 (not -1 and +1); round(0.5) is 0. Any shape.
    Signed: 2 round(n h((x + 1) / 2)) / n - 1, as the paper has it for weights, whatever the bound.

    Args:
        bits: 1..16
        bound: 'clip', or 'abs' for the min(1, |x|) of the authors' SVHN script

    Raises:
        ValueError: an argument out of its range

    Reference: 1606.06160 Eq. 5, Sec. 2.4
    """

    casts = True

    def __init__(self, layer: nn.Module, site: str, *, bits: int, bound: str = "clip") -> None:
        super().__init__(layer, site)
        self.bits = check_bits(bits, 1, 16)
        self.n = 2**self.bits - 1
        self.bound = check_choice("bound", bound, ("clip", "abs"))

    def quantize(self, x: Tensor) -> Tensor:
        if self.signed:
            return 2 * _Bounded.apply((x + 1) / 2, self.n, "clip") - 1  # type: ignore[no-any-return]
        return _Bounded.apply(x, self.n, self.bound)  # type: ignore[no-any-return]

    def kernel(self, shape: torch.Size) -> Kernel | None:
        clips = self.bound == "clip" and not self.signed
        return Kernel("clip", 1.0, steps=self.n, closed=True) if clips else None

    def grid(self, x: Tensor | None = None) -> Affine:
        return affine(2 / self.n, 0, self.n, offset=-torch.ones(())) if self.signed else affine(1 / self.n, 0, self.n)


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
