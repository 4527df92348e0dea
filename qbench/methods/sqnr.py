"""Fixed point with the bits of each layer from a rule about signal-to-noise ratios. Reference: 1511.06393"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.grid import Affine
from qbench.quant.layers import quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.passes import recalibrate
from qbench.quant.quantizer import Quantizer
from qbench.quant.surgery import activation_quantizers
from qbench.quant.uniform import UniformGrid

FEWEST, MOST = 2, 16


def distortion(step: float, bits: int) -> float:
    """Mean squared error of N(0, 1) on the 2^bits levels +-step/2, +-3 step/2, ..."""
    k = torch.arange(2 ** (bits - 1), dtype=torch.double)
    low, high, level = k * step, (k + 1) * step, (k + 0.5) * step
    high[-1] = math.inf

    def density(x: Tensor) -> Tensor:
        return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    share = torch.special.ndtr(-low) - torch.special.ndtr(-high)
    mean = density(low) - density(high)
    square = share + low * density(low) - torch.where(high.isinf(), 0.0, high) * density(high)
    return 2 * float((square - 2 * level * mean + level.square() * share).sum())


@cache
def stepsize(bits: int) -> float:
    """The step of least `distortion`, found by golden sections.

    Reference: 1511.06393 (Stepsize of a Gaussian; the table itself was not seen)
    """
    low, high, golden = 0.0, math.sqrt(bits) * 2.0 ** (3 - bits), (math.sqrt(5) - 1) / 2
    while high - low > 1e-7 * high:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if distortion(a, bits) < distortion(b, bits) else (a, high)
    return (low + high) / 2


def allocate(sizes: Sequence[int], mean: float, kappa: float) -> list[int]:
    """Whole bits of each tensor, in 2..16: b_i - b_j = 10 / kappa log10(size_j / size_i), of a mean of at most `mean`.

    The mean counts each tensor by its size. One bit after the other goes to the tensor that lies farthest below the
    rule, of equally far ones to the first, until the mean does not allow the next one.

    Reference: 1511.06393 (the rule: the smallest net of a given ratio, where each bit is worth kappa dB)
    """
    wanted = [-10 / kappa * math.log10(size) for size in sizes]
    found, left = [FEWEST] * len(sizes), (mean - FEWEST) * sum(sizes) + 1e-6
    while open_ones := [i for i, n in enumerate(found) if n < MOST]:
        most = max(open_ones, key=lambda i: round(wanted[i] - found[i], 9))
        if sizes[most] > left:
            break
        found[most] += 1
        left -= sizes[most]
    return found


class FixedPointStep(UniformGrid):
    """Equal steps about 0, the step being what is best for a Gaussian: x_hat = clip(round(x / s), lowest, highest) s.

    s = xi Stepsize(bits), with xi^2 the mean of x^2; as `fixed_point` the next power of two from there on. Codes are
    -2^(bits-1)..2^(bits-1) - 1, or 0..2^bits - 1 where x was never negative, with the step of one more bit, as half a
    Gaussian has it (ours). Gradient as in UniformGrid.

    Args:
        bits: 2..16; where it is no whole number the quantizer begins with the next lower one
        fixed_point: steps are powers of two

    Errors: ValueError on bits out of range.
    Reference: 1511.06393
    """

    told = ("symmetric", "fixed_point")
    step: Tensor
    xi: Tensor

    def __init__(self, layer: nn.Module, site: str, *, bits: float, fixed_point: bool = True) -> None:
        super().__init__(layer, site, bits=math.floor(bits), symmetric=True)
        self.fixed_point = fixed_point
        self.register_buffer("xi", torch.ones(()))
        self.register_buffer("step", torch.ones(()))
        self.values = 0  # of one image, or of the weight
        self._square, self._count, self._negative = 0.0, 0, False
        self.fit()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        x = x.detach()
        self.values = x.numel() if self.site == "weight" else x[0].numel()
        self._square += float(x.double().square().sum())
        self._count += x.numel()
        self._negative |= bool((x < 0).any())

    @torch.no_grad()
    def finish_calibration(self) -> None:
        if self._count:
            self.xi.fill_(math.sqrt(self._square / self._count))
            self.signed = self.site == "weight" or self._negative
            self._square, self._count, self._negative = 0.0, 0, False
            self.fit()

    def fit(self, bits: int | None = None) -> None:
        """Set the step from xi and the bits, new ones where given."""
        self.bits = self.bits if bits is None else bits
        step = self.xi.double() * stepsize(int(self.bits) + (not self.signed))
        if self.fixed_point:
            step = step.log2().ceil().exp2()
        self.step.copy_(torch.where(step > torch.finfo(torch.float32).tiny, step, 1.0))

    def grid(self, x: Tensor | None = None) -> Affine:
        return self._between(self.step, torch.zeros_like(self.step))

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "bits": self.bits}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.bits = state["bits"]


class AllocateBits(Hook):
    """Once calibrated, give each weight and each input its bits by the rule, and find the steps for them.

    Weights count by their numbers, inputs by the numbers of an image. Each of the two has a budget of its own. What was
    given other bits beforehand (layer_bits) keeps them, and does not count.

    Args:
        w_bits, a_bits: mean bits; 32: float
        kappa: dB that a bit is worth, above 0

    Errors: ValueError on kappa out of range.
    Reference: 1511.06393
    """

    def __init__(self, w_bits: float, a_bits: float, kappa: float = 5.0) -> None:
        super().__init__()
        if kappa <= 0:
            raise ValueError(f"kappa must be above 0 dB per bit, got {kappa}")
        self.budgets, self.kappa = (w_bits, a_bits), kappa

    @torch.no_grad()
    def after_calibrate(self, state: State) -> None:
        weights = [m.weight_quantizer for _, m in quant_layers(state.model)]
        sites: list[list[Quantizer | None]] = [weights, [*activation_quantizers(state.model).values()]]
        for quantizers, mean in zip(sites, self.budgets, strict=True):
            found = [q for q in quantizers if isinstance(q, FixedPointStep) and q.bits == math.floor(mean)]
            for q, bits in zip(found, allocate([q.values for q in found], mean, self.kappa), strict=True):
                q.fit(bits)
        recalibrate(state.model, state.calibration.epoch(0))
