"""PACT: Parameterized Clipping Activation for Quantized Neural Networks (arXiv 1805.06085); PACT-SAWB's, too."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.methods.shared.sample import Sample
from qbench.quant import ops
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Kernel, Rectifier, check_bits

SMALLEST = 1e-3  # alpha is read as at least this: its decay may pull it to 0, and a step of 0 divides by 0
PAPER = 10.0  # the initial alpha of the paper's Figure 2


@ops.formula
def _clip(x: Tensor, alpha: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y_hat, where x lies between 0 and alpha, where above)."""
    z, a = x.float(), alpha.clamp_min(SMALLEST)
    above = z >= a
    return z.clamp_min(0).minimum(a).mul_(n / a).round_().mul_(a / n).to(x.dtype), (z >= 0) ^ above, above


@ops.formula
def _clip_backward(g: Tensor, inside: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    return g * inside, (g * above).float().sum()


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, n: int) -> Tensor:
        y, *masks = _clip(x, alpha, n)
        ctx.save_for_backward(*masks)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_clip_backward(grads[0], *ctx.saved_tensors), None


class PACT(Rectifier):
    """In place of a ReLU: a clipped ReLU whose clip alpha is learned, one per layer, quantized to 2^bits levels.

    y = clip(x, 0, alpha); y_hat = round(y n / alpha) alpha / n, n = 2^bits - 1.
    Gradient: dy_hat/dx = 1 for 0 <= x < alpha, else 0; dy_hat/dalpha = 1 for x >= alpha, else 0, summed over all x.
    (Composing straight-through primitives would add round(x n / alpha) / n - x / alpha inside; the paper has 0 there.)
    Signed: 2^bits levels over -alpha..alpha, none of them 0, as DoReFa's weights are (the paper's inputs all follow a
    ReLU): y_hat = round((clip(x, -alpha, alpha) + alpha) n / (2 alpha)) 2 alpha / n - alpha, and -1 for x < -alpha.
    The L2 term on alpha is the optimizer's weight decay: alpha's parameter group says so. Any shape.

    Departure: from a float net alpha starts at the clip of least squared error over the calibration images, because a
    few epochs of fine-tuning do not bring the paper's 10 down. With init='scratch' it starts at 10 as in the paper.

    Args:
        bits: 1..16
        alpha: initial clip, above 0; None: 10 with init='scratch', else calibrated
        init: 'scratch', or anything else for a start from a float net

    Raises:
        ValueError: bits or alpha out of range

    Reference: 1805.06085 Eq. 1 to 3; Figure 2 for the initial value
    """

    casts = True

    def __init__(
        self, layer: nn.Module, site: str, *, bits: int, alpha: float | None = None, init: str | None = None
    ) -> None:
        super().__init__(layer, site)
        self.bits = check_bits(bits, 1, 16)
        self.n = 2**self.bits - 1
        if alpha is not None and alpha <= 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")
        self.calibrated = alpha is None and init != "scratch"
        self.alpha = nn.Parameter(torch.tensor(PAPER if alpha is None else float(alpha)))
        self._sample = Sample()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        super().calibrate(x)
        if self.calibrated:
            self._sample.add(x)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Set alpha to the one of 64 fractions of the largest value that leaves the least squared error."""
        if (x := self._sample.take()) is None:
            return
        x = x if self.signed else x.relu()
        if (largest := x.abs().max()) > 0:  # else no image excites this layer, and the paper's value stays
            tries = largest * torch.linspace(1 / 64, 1, 64, device=x.device)
            errors = [(self._at(x, a) - x).square_().sum() for a in tries]
            self.alpha.copy_(tries[torch.stack(errors).argmin()])

    def _at(self, x: Tensor, alpha: Tensor) -> Tensor:
        if not self.signed:
            return _Clip.apply(x, alpha, self.n)  # type: ignore[no-any-return]
        a = alpha.clamp_min(SMALLEST)
        return _Clip.apply(x + a, 2 * a, self.n) - a  # type: ignore[no-any-return]

    def quantize(self, x: Tensor) -> Tensor:
        return self._at(x, self.alpha)

    def kernel(self, shape: torch.Size) -> Kernel | None:
        if self.signed:
            return None
        return Kernel("clip", max(self.alpha.item(), SMALLEST), (self.alpha,), self.n)

    def grid(self, x: Tensor | None = None) -> Affine:
        alpha = self.alpha.detach().clamp_min(SMALLEST)
        return (
            affine(2 * alpha / self.n, 0, self.n, offset=-alpha) if self.signed else affine(alpha / self.n, 0, self.n)
        )
