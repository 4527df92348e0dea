"""Binarized neural networks: binary weights and activations in every layer. Reference: arXiv 1602.02830"""

from typing import Any

import torch
from torch import Tensor, nn

from qbench import ops
from qbench.binary import Sign
from qbench.quantizer import Kernel


class BinaryActivation(Sign):
    """x_hat = sign(x) in place of a ReLU, +1 at 0; stochastic: +1 with probability clip((x + 1) / 2, 0, 1), else -1.

    The gradient is that of hardtanh, 1[|x| <= 1] (Eq. 4), in both cases; 1 everywhere without `clip_gradients`, the
    plain straight-through estimator of Alizadeh et al. Stochastic signs are for the training alone (Sec. 1.1), as in
    the authors' Torch code; in evaluation the sign is deterministic. Any shape.

    Errors: ValueError on bits other than 1.
    Reference: arXiv 1602.02830, Eq. 1, 2 and 4
    """

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: float = 1,
        stochastic: bool = False,
        clip_gradients: bool = True,
    ) -> None:
        super().__init__(layer, site, bits=bits, gradient="clipped" if clip_gradients else "identity")  # type: ignore[arg-type]
        self.stochastic = stochastic

    def quantize(self, x: Tensor) -> Tensor:
        hat = super().quantize(x)
        if not (self.stochastic and self.training):
            return hat
        u = torch.rand(x.shape, generator=self.generator, device=x.device)
        drawn = torch.where(u < (x + 1) / 2, 1.0, -1.0)  # u in [0, 1) does the clipping
        return ops.straight_through(hat, drawn)

    def kernel(self, shape: torch.Size) -> Kernel | None:
        return None if self.stochastic and self.training else super().kernel(shape)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"stochastic": self.stochastic}
