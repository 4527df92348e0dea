"""DoReFa-Net's activations (arXiv 1606.06160), which are WRPN's, too."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant import ops
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Kernel, Rectifier, check_bits, check_choice


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
