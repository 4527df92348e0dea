"""Ternary weights with a trained threshold, by a truncated-Gaussian approximation. Reference: arXiv 1810.01018"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Codes, Quantizer, check_bits


def tail_mean(a: Tensor) -> tuple[Tensor, Tensor]:
    """lambda(a) = phi(a) / (1 - Phi(a)) = E(z : z > a) for z ~ N(0, 1), and its slope lambda * (lambda - a)."""
    mean = math.sqrt(2 / math.pi) / torch.special.erfcx(a / math.sqrt(2))
    return mean, mean * (mean - a)


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, delta: Tensor) -> Tensor:
        sigma = w.std(correction=0).clamp_min(1e-8)
        bound = torch.minimum(delta, w.abs().amax())  # the largest weight always survives
        t = (w >= bound).to(w.dtype) - (w <= -bound).to(w.dtype)
        mean, slope = tail_mean(bound / sigma)
        ctx.save_for_backward(t, slope, w.abs() < 1)
        return sigma * mean * t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        t, slope, inside = ctx.saved_tensors
        g = grads[0]
        return g * inside, slope * (g * t).sum()


class TGA(Quantizer):
    """w_hat = S * t, t = sign(w) where |w| >= Delta, else 0, with a trained Delta and a closed form for the scale S.

    S = E(|w| : |w| > Delta) for w ~ N(0, sigma^2) with sigma the standard deviation of the layer's weights:
    S = sigma * lambda(a), a = Delta / sigma, lambda(a) = phi(a) / (1 - Phi(a)). With g = dL/dw_hat:
      dL/dDelta = lambda (lambda - a) * sum(g * t)     Delta acts through S alone
      dL/dw     = g * 1[|w| < 1]                       S * (1/S): the paper's gradient correctness; sigma is a constant
    Behind a batch-norm a layer computes the same whatever its scale, so that sum(g * t) is near 0 and Delta hardly
    moves there. Starts at Delta = threshold * max|w|.

    Weight: any shape, one Delta a layer. Two bits a weight, of which three codes are used.

    The clip at 1, the start and the mean of 0 are those of the authors' code for arXiv 1807.07948, their paper before
    this one: of this paper's own no code is known.

    Errors: ValueError on bits other than 2, a threshold not in 0..1 (1 excluded).
    Reference: arXiv 1810.01018, Sec. 3
    """

    idempotent = False  # sigma of the ternary weights is another one

    def __init__(self, layer: QuantLayer, site: str, *, bits: float = 2, threshold: float = 0.05) -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 2)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, got {threshold!r}")
        self.threshold = threshold
        self.delta = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.delta.copy_(self.threshold * x.abs().amax())

    def quantize(self, x: Tensor) -> Tensor:
        return _Ternary.apply(x, self.delta)  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def codes(self, x: Tensor) -> Codes:
        """Codes -1, 0, +1; S is the step."""
        hat = self(x.float())
        return Codes("affine", hat.sign().to(torch.int8), {"step": hat.abs().amax()})

    @property
    def levels(self) -> int:
        return 3

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"threshold": self.threshold}


class PositiveThresholds(Hook):
    """Keep thresholds at 0 or above. Reference: arXiv 1810.01018, Sec. 3"""

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        for _, layer in quant_layers(state.model):
            if isinstance(layer.weight_quantizer, TGA):
                layer.weight_quantizer.delta.clamp_(min=0)
