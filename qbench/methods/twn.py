"""Ternary weight networks: -alpha, 0, +alpha by a threshold on |w|. Reference: arXiv 1605.04711"""

import torch
from torch import Tensor

from qbench.quant import ops
from qbench.quant.grid import Affine, affine
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer, check_bits, check_choice

RULES = ("mean", "max", "optimal")
GRANULARITIES = ("filter", "layer")


class TernaryWeight(Quantizer):
    """w_hat = alpha * t, t = +1 where w > Delta, -1 where w < -Delta, else 0; alpha = mean of |w| where |w| > Delta.

    That alpha is the least-squares scale for any Delta (Eq. 4). Delta is one of
      mean:    factor * mean|w|, the paper's rule; it is near the best one for Gaussian weights with factor 0.75 (0.7 in
               the paper's first versions, and in most other code) and for uniform weights with 2/3
      max:     factor * max|w|, with factor 0.05 in arXiv 1807.07948
      optimal: the threshold of least squared error, which keeps the k largest |w| with the highest (their sum)^2 / k
               (Eq. 5); `factor` is not used
    The gradient of the loss with respect to w_hat goes to w unchanged (Algorithm 1). |w| = Delta is 0, and where no
    weight is above Delta all are 0.

    Weight: [out, in, ...]. Two bits a weight, of which three codes are used.

    Args:
        per: Delta and alpha of each output `filter`, as the paper's last version says, or of the whole `layer`

    Errors: ValueError on bits other than 2, an unknown rule or `per`, a factor that is not above 0.
    Reference: arXiv 1605.04711v3, Eq. 2-7 and Algorithm 1
    """

    told = ("rule", "factor")

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 2,
        rule: str = "mean",
        factor: float = 0.75,
        per: str = "filter",
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 2)
        self.rule = check_choice("rule", rule, RULES)
        self.per = check_choice("per", per, GRANULARITIES)
        if not factor > 0:
            raise ValueError(f"factor must be above 0, got {factor!r}")
        self.factor = float(factor)
        self.granularity = "per_channel" if per == "filter" else "per_tensor"
        self.idempotent = rule == "optimal" or factor < 1  # else Delta may lie above alpha

    def _rows(self, w: Tensor) -> Tensor:
        """|w| in float64, one row per scale, so that the mean of equal magnitudes is that magnitude."""
        return w.detach().abs().double().reshape(w.shape[0] if self.per == "filter" else 1, -1)

    def threshold(self, w: Tensor) -> Tensor:
        """Delta of each row, float64 [rows, 1]; -1 where `optimal` keeps every weight."""
        a = self._rows(w)
        if self.rule == "mean":
            return self.factor * a.mean(1, keepdim=True)
        if self.rule == "max":
            return self.factor * a.amax(1, keepdim=True)
        ordered = a.sort(1, descending=True).values
        kept = ordered.cumsum(1).square() / torch.arange(1, a.shape[1] + 1, device=a.device)
        below = torch.cat([ordered[:, 1:], -torch.ones_like(ordered[:, :1])], 1)
        return below.gather(1, kept.argmax(1, keepdim=True))

    def ternary(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(t of w's shape, alpha [out or 1, 1, ...])."""
        a = self._rows(w)
        mask = a > self.threshold(w)
        alpha = (a * mask).sum(1) / mask.sum(1).clamp_min(1)  # no survivors: 0
        t = mask.view(w.shape) * ops.sign_value(w.detach())
        return t, alpha.to(w.dtype).view(-1, *[1] * (w.dim() - 1))

    def quantize(self, x: Tensor) -> Tensor:
        t, alpha = self.ternary(x)
        return ops.straight_through(x, alpha * t)

    def grid(self, x: Tensor | None = None) -> Affine:
        """Codes -1, 0, +1; alpha is the step."""
        return affine(None if x is None else self.ternary(x)[1], -1, 1)
