"""Incremental network quantization: powers of two, frozen portion by portion. Reference: arXiv 1702.03044"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qbench.quant import ops
from qbench.quant.grid import Book, multiples
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Quantizer, check_bits, check_choice

PARTITIONS = ("magnitude", "random")
GROWTH = ("follow", "zero", "saturate")


def power(x: Tensor) -> Tensor:
    """2^floor(log2(4 x / 3)) of each x >= 0: the nearest power of two, of two equally near ones the higher; 0 of 0.

    Exact, as are all bounds below: no logarithm is rounded.
    """
    ratio = x / 0.75
    return torch.where(ratio > 0, ratio / (2 * ratio.frexp().mantissa), 0.0)


class INQ(Quantizer):
    """Weights that are frozen on the grid {0, +-2^n2 .. +-2^n1} portion by portion, while the others train in float.

    n1 = floor(log2(4 s / 3)), s = max|w| of the layer; n2 = n1 + 1 - 2^(bits - 1) / 2 (Eq. 1-3). One of the bits says
    whether a weight is 0, so that there are 2^(bits - 1) + 1 values: 17, 9, 5 and 3 for 5, 4, 3 and 2 bits.
    w_hat = beta sign(w) where (alpha + beta) / 2 <= |w| < 3 beta / 2, alpha < beta neighbours on the grid, else 0 (Eq.
    4): the nearest value, of two equally near ones the larger.

    While training, w_hat is the frozen value where there is one, with gradient 0, and else w, with gradient 1 (Eq. 8).
    No update can move a frozen weight, as momentum and weight decay would, since its latent is no longer read. In
    evaluation all weights are on the grid: the net as it would be if the free ones were frozen now.

    Weight: any shape, one n1 a layer.

    Args:
        partition: what is frozen first: the largest weights (`magnitude`, which the paper calls pruning-inspired) or
            `random` ones
        growth: what becomes of a free weight that grows beyond 3/2 2^n1, the last for which Eq. 4 has a value:
            follow:   n1 is that of the weights at each portion (Algorithm 1, line 5). No weight is too large for it.
                      Where n1 rises, those frozen at the lowest values, which are no longer on the grid, are rounded
                      anew (line 6)
            zero:     n1 is that of the float net, and Eq. 4 as it stands makes a 0 of what is too large
            saturate: n1 is that of the float net, and what is too large becomes +-2^n1
            The authors' code follows, and saturates, which then changes nothing.

    s is of all weights of the layer, as Eq. 3 has it, and not of the frozen ones alone, as line 5 of Algorithm 1 has
    it: the same for `magnitude`; with `random`, n1 would rise from portion to portion.

    Errors: ValueError on bits outside 2..8, an unknown partition or growth.
    Reference: arXiv 1702.03044, Eq. 1-8 and Algorithm 1
    """

    told = ("partition", "growth")
    frozen: Tensor
    held: Tensor
    first: Tensor

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 5,
        partition: str = "magnitude",
        growth: str = "follow",
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 8)
        self.partition = check_choice("partition", partition, PARTITIONS)
        self.growth = check_choice("growth", growth, GROWTH)
        self.powers = 2 ** (self.bits - 2)  # n1 - n2 + 1
        # drawn once, so that portions are nested, and equal on all workers and in a resumed run
        self.seed = int(torch.randint(2**62, ())) if partition == "random" else None
        weight = layer.weight.detach()
        self.register_buffer("frozen", torch.zeros_like(weight, dtype=torch.bool))  # 1 - T
        self.register_buffer("held", torch.zeros_like(weight))
        self.register_buffer("first", weight.new_zeros(()))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.first.copy_(power(x.abs().amax()))

    def present(self, w: Tensor) -> Tensor:
        """The weights that the layer has: frozen values, and `w` where none is; w's gradient is 0 or 1."""
        return torch.where(self.frozen, self.held, w)

    def top(self, w: Tensor) -> Tensor:
        """2^n1, 0-dim."""
        return power(w.abs().amax()) if self.growth == "follow" else self.first

    def rounded(self, w: Tensor) -> Tensor:
        """Eq. 4 on each of `w`."""
        top, size = self.top(w), w.abs()
        low = top * 2.0 ** (1 - self.powers)
        inside = size >= low / 2
        if self.growth == "zero":
            inside &= size < 1.5 * top
        return torch.where(inside, w.sign() * power(size).clamp(low, top), 0.0)

    def quantize(self, x: Tensor) -> Tensor:
        w = self.present(x)
        return w if self.training else ops.straight_through(w, self.rounded(w.detach()))

    @torch.no_grad()
    def freeze(self, w: Tensor, portion: float) -> Tensor:
        """Freeze more of `w`, until `portion` of them are; the layer's weights thereafter."""
        w = self.present(w)
        order = w.abs()
        if self.seed is not None:
            order = torch.rand(w.shape, generator=torch.Generator().manual_seed(self.seed)).to(w.device)
        ranks = order.masked_fill(self.frozen, torch.inf).flatten().argsort(descending=True, stable=True)
        chosen = torch.zeros_like(ranks, dtype=torch.bool)
        chosen[ranks[: round(portion * len(ranks))]] = True
        self.frozen.copy_(chosen.view(w.shape))
        self.held.copy_(torch.where(self.frozen, self.rounded(w), 0.0))
        return self.present(w)

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Book:
        """Codes count from -2^n1 up to 2^n1; 0 is in the middle."""
        powers = [2.0**-i for i in range(self.powers)]
        known = self.first if self.growth != "follow" else None
        top = known if x is None else self.top(self.present(x))
        return multiples(top, [*(-p for p in powers), 0.0, *reversed(powers)])


class Freeze(Hook):
    """Freeze another portion of each layer's weights as a stage begins: the stage's value, or all of them.

    Args:
        portions: the values of the stages, each of all weights of a layer, those of the stages before included

    Errors: ValueError where they do not rise, or are not between 0 and 1.
    Reference: arXiv 1702.03044, Algorithm 1
    """

    def __init__(self, portions: Sequence[float]) -> None:
        super().__init__()
        numbers = [p for p in portions if isinstance(p, int | float)]
        if numbers != list(portions) or not all(low < high for low, high in pairwise([0, *numbers, 1])):
            raise ValueError(f"portions must rise, each above 0 and below 1, got {list(portions)}; all weights follow")

    @torch.no_grad()
    def before_stage(self, state: State) -> None:
        portion = 1.0 if state.stage.value is None else state.stage.value
        for _, layer in quant_layers(state.model):
            if isinstance(layer.weight_quantizer, INQ):
                layer.weight.copy_(layer.weight_quantizer.freeze(layer.weight, portion))
