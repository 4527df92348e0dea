"""DiffQ: learned bits of groups of weights, by noise in place of rounding. Reference: arXiv 2104.09987"""

import math

import torch
from torch import Tensor, nn

from qbench.quant.groups import Groups
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Quantizer, check_bits, check_choice

MEGABYTE = 2**23  # bits


class DiffQ(Quantizer):
    """In training noise of a rounding's size in place of the rounding, whose size has a gradient for the bits.

    A group is `group` weights that follow each other in the flattened tensor; its bits are learned as a logit l:
      b = min_bits + sigmoid(l) (max_bits - min_bits)
      Delta = (max w - min w) / (2^b - 1)         max and min of the whole tensor
    Training:   w_hat = w + Delta u, u drawn anew in each forward: uniform in -1/2..1/2, or, with noise=gaussian, of
                standard deviation 1/2, which the released code has by default (1.73 times that of rounding)
    Evaluation: w_hat = min w + Delta round((w - min w) / Delta) with b rounded
    Gradient: there is no straight-through estimator. w gets g = dL/dw_hat, and min w and max w what reaches Delta;
    dL/dl = sum over the group of g u * dDelta/db * db/dl, with dDelta/db = -(max w - min w) ln 2 * 2^b / (2^b - 1)^2.

    Weight: any shape; where `group` does not divide its size, groups are of the largest divisor below. `logits` are
    [groups, 1].

    Args:
        bits: of all groups at the start, above min_bits and below max_bits
        group: weights that share their bits
        min_bits, max_bits: 1..16, whole numbers
        noise: uniform | gaussian

    Errors: ValueError on an argument out of its range.
    Reference: arXiv 2104.09987
    """

    granularity = "per_group"
    told = ("group", "noise")

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 8,
        group: int = 8,
        min_bits: int = 2,
        max_bits: int = 15,
        noise: str = "uniform",
    ) -> None:
        super().__init__()
        self.min_bits = check_bits(min_bits, 1, 15, "min_bits")
        self.max_bits = check_bits(max_bits, self.min_bits + 1, 16, "max_bits")
        if not self.min_bits < bits < self.max_bits:
            raise ValueError(f"the first bits must be between {min_bits} and {max_bits}, both excluded, got {bits!r}")
        self.noise, count = check_choice("noise", noise, ("uniform", "gaussian")), layer.weight.numel()
        if isinstance(group, bool) or group != int(group) or group < 1:
            raise ValueError(f"group must be a whole number of at least 1, got {group!r}")
        group = self.group = next(g for g in range(min(int(group), count), 0, -1) if count % g == 0)
        share = (bits - self.min_bits) / (self.max_bits - self.min_bits)
        self.logits = nn.Parameter(torch.full((count // group, 1), math.log(share / (1 - share))))

    def learned(self) -> Tensor:
        """b of each group, real numbers, [groups, 1]."""
        return self.min_bits + self.logits.sigmoid() * (self.max_bits - self.min_bits)

    @property
    def bits(self) -> float:  # type: ignore[override]
        """The mean, over the weights, of the rounded bits."""
        return self.learned().detach().round().mean().item()

    def quantize(self, x: Tensor) -> Tensor:
        if not self.training:
            grid = self.grid(x.detach())
            return grid.values(grid.codes(x.detach(), x))
        rows = x.reshape(-1, self.group)
        delta = (x.amax() - x.amin()) / (2 ** self.learned() - 1)
        return (rows + delta * self._drawn(rows)).reshape(x.shape)

    def _drawn(self, like: Tensor) -> Tensor:
        draw = torch.rand if self.noise == "uniform" else torch.randn
        u = draw(like.shape, generator=self.generator, device=like.device)
        return u - 0.5 if self.noise == "uniform" else u / 2

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Groups:
        """Codes 0..2^b - 1 of each group, from the least to the greatest weight of the tensor."""
        bits = self.learned().round().long()
        hi = 2**bits - 1
        least, greatest = torch.arange(2.0, device=bits.device) if x is None else (x.amin(), x.amax())
        return Groups(
            step=(greatest - least) / hi,
            zero=torch.zeros_like(least),
            lo=0,
            hi=hi,
            view=(len(bits), self.group),
            dynamic=x is None,
            least=least,
            greatest=greatest,
            fewest=self.min_bits,
        )

    def gradient_share(self, x: Tensor) -> Tensor:
        """All of it reaches every weight in training; evaluation, which rounds, has none."""
        return torch.ones_like(x)

    def traces(self) -> dict[str, float]:
        return {"bits": self.learned().detach().mean().item()}


class ModelSize(Hook):
    """Add penalty * M to the loss, M = sum over all weights of the bits of their group / 2^23, in MB.

    Departure: what has no gradient is left out: the tensors in float, both ends of each layer, the bits that store the
    bits.

    Errors: ValueError on a penalty below 0.
    Reference: arXiv 2104.09987
    """

    def __init__(self, penalty: float = 5.0) -> None:
        super().__init__()
        if penalty < 0:
            raise ValueError(f"penalty must be at least 0, got {penalty!r}")
        self.penalty = penalty
        self.found: list[DiffQ] | None = None

    def loss(self, state: State) -> Tensor | None:
        if self.found is None:  # looking for them takes milliseconds
            quantizers = [layer.weight_quantizer for _, layer in quant_layers(state.model)]
            self.found = [q for q in quantizers if isinstance(q, DiffQ)]
        if not self.found:
            return None
        return self.penalty / MEGABYTE * torch.stack([q.group * q.learned().sum() for q in self.found]).sum()
