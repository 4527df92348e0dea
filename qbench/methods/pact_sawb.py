"""SAWB: statistics-aware weight binning, the weights of PACT-SAWB (arXiv 1807.06964); its activations are PACT's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.quant.grid import Affine, affine
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer, check_bits

# (c1, c2) by bits, from the quantizers of the authors' company (fms-model-optimizer, Apache-2.0). They are fits over
# bell-shaped distributions; those that the paper prints were not seen.
COEFFICIENTS = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 5: (17.74, -18.64), 8: (31.76, -35.04)}
WITH_ZERO = {2: (2.6, -1.71), 4: (12.035, -12.03), 8: (31.76, -35.04)}  # for grids of 3, 15 and 255 levels


class _Bins(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, half: float, shift: float, clip: bool) -> Tensor:
        ctx.save_for_backward(*((w.abs() <= alpha,) if clip else ()))
        place = w.maximum(-alpha).minimum(alpha).div_(alpha).mul_(half)
        return place.add_(shift).round_().sub_(shift).mul_(alpha / half)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        g = grads[0] * ctx.saved_tensors[0] if ctx.saved_tensors else grads[0]
        return g, None, None, None, None


class SAWB(Quantizer):
    """Weights on 2^bits equal steps between -alpha and alpha; alpha = c1 sqrt(mean w^2) + c2 mean|w|, at every step.

    w_hat = alpha (2 round(n (clip(w / alpha, -1, 1) / 2 + 1/2)) / n - 1), n = 2^bits - 1: no level is 0.
    With `zero`: w_hat = alpha round(m clip(w / alpha, -1, 1)) / m, m = 2^(bits - 1) - 1: one level less, and 0 is one.
    Gradient: 1, or with `clip_gradient` 1[|w| <= alpha]; alpha is a constant. Any shape, one alpha per tensor.

    alpha is at least mean|w|: for weights that are nearly of two values, for which no bell-shaped fit was made, the
    formula falls below 0 from 4 bits on. Where all weights are +-m, mean|w| = m is exact.

    Args:
        bits: 2, 3, 4, 5 or 8, with `zero` 2, 4 or 8: the widths of the table. With `coefficients` of one's own 2..8
        zero: see above
        coefficients: (c1, c2); None: those of the table
        clip_gradient: see above

    Raises:
        ValueError: bits without coefficients, or coefficients that are no two numbers

    Reference: arXiv 1807.06964 (its abstract; formula and coefficients as in the tool named above)
    """

    idempotent = False  # quantized weights have other moments

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: int,
        zero: bool = False,
        coefficients: Sequence[float] | None = None,
        clip_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.bits = width = check_bits(bits, 2, 8)
        self.zero, self.clip_gradient = zero, clip_gradient
        table = WITH_ZERO if zero else COEFFICIENTS
        if coefficients is None and width not in table:
            kind = "a grid with 0" if zero else "SAWB"
            raise ValueError(f"{kind} has coefficients for {', '.join(map(str, table))} bits, got {width}")
        found = table[width] if coefficients is None else tuple(coefficients)
        if len(found) != 2 or not all(isinstance(c, int | float) for c in found):
            raise ValueError(f"coefficients must be two numbers, c1 and c2, got {list(found)}")
        self.c1, self.c2 = found
        self.steps: float = 2 ** (width - 1) - 1 if zero else (2**width - 1) / 2  # steps from 0 to alpha

    def alpha(self, w: Tensor) -> Tensor:
        """0-dim; 1 where all weights are 0."""
        w = w.detach()
        size = w.abs().mean()
        found = torch.maximum(self.c1 * w.square().mean().sqrt() + self.c2 * size, size)
        return torch.where(found < torch.finfo(found.dtype).tiny, 1.0, found)

    def quantize(self, x: Tensor) -> Tensor:
        shift = 0.0 if self.zero else self.steps
        return _Bins.apply(x, self.alpha(x), self.steps, shift, self.clip_gradient)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Affine:
        step = None if x is None else self.alpha(x) / self.steps
        if self.zero:
            return affine(step, -int(self.steps), int(self.steps))
        return affine(step, 0, int(2 * self.steps), zero=self.steps)
