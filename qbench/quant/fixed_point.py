"""Fixed point with round-to-nearest, floor or stochastic rounding."""

import torch
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.quant import ops
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Quantizer, check_bits, check_choice


class FixedPoint(Quantizer):
    """Fixed point <IL, FL> of bits = IL + FL: sign inside IL, step 2^-FL, range -2^(IL-1) .. 2^(IL-1) - 2^-FL.

    x_hat = 2^-FL min(max(round(2^FL x), -2^(bits-1)), 2^(bits-1) - 1): rounded first, then saturated. Any shape; one
    grid for the whole tensor. Gradient 1 everywhere, saturated values included: on this the paper is silent.

    rounding: 'nearest' (ties to even), 'floor', or 'stochastic': up with a probability equal to the distance from the
    grid point below, in steps, hence unbiased; nearest in eval mode.

    Args:
        bits: 2..24; a float32 holds every such number exactly
        integer: IL, may be negative (errors are small)
        fraction: FL; None for bits - integer, otherwise it sets IL to bits - fraction
        rounding: 'nearest' | 'stochastic' | 'floor'

    Raises:
        ValueError: an argument out of its range
        UserError: more than 8 bits asked of a bfloat16 tensor, which carries 8 significant bits

    Reference: 1502.02551 Sec. 3
    """

    told = ("format", "rounding")

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        integer: int = 2,
        fraction: int | None = None,
        rounding: str = "nearest",
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 24)
        self.fraction = self.bits - integer if fraction is None else fraction
        if not -64 <= self.fraction <= 64:
            raise ValueError(f"fraction must be in -64..64, got {self.fraction}")
        self.rounding = check_choice("rounding", rounding, ("nearest", "stochastic", "floor"))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and self.bits > 8:
            raise UserError(
                f"{self.bits}-bit fixed point does not fit into bf16 (8 significant bits); use train.precision=fp32"
            )
        return super().forward(x)

    def _integers(self, x: Tensor) -> Tensor:
        z = x * 2.0**self.fraction
        below = z.floor()
        if self.rounding == "nearest" or (self.rounding == "stochastic" and not self.training):
            below = z.round_()
        elif self.rounding == "stochastic":  # noise on the remainder alone: z + u in float32 would move grid points
            noise = torch.rand(z.shape, generator=self.generator, device=z.device, dtype=z.dtype)
            below += noise.add_(z.sub_(below)).floor_()
        half = 2 ** (int(self.bits) - 1)
        return below.clamp_(-half, half - 1)

    def quantize(self, x: Tensor) -> Tensor:
        return ops.straight_through(x, self._integers(x.detach()).mul_(2.0**-self.fraction))

    def grid(self, x: Tensor | None = None) -> Affine:
        """Two's complement integers with step 2^-FL."""
        half = 2 ** (int(self.bits) - 1)
        return affine(2.0**-self.fraction, -half, half - 1)

    @property
    def format(self) -> str:
        """<IL, FL> in a manifest."""
        return f"<{int(self.bits) - self.fraction},{self.fraction}>"
