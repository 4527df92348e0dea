"""Cross-layer equalization and bias absorption: the float net's weights moved between layers before quantization.

Reference: 1906.04721 (DFQ)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.quant import ops, surgery
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.passes import recalibrate
from qbench.quant.quantizer import check_choice

# f(s x) = s f(x) for each channel's s > 0, as for a BoundedReLU whose bound moves along.
HOMOGENEOUS = (nn.Identity, nn.ReLU, nn.Dropout, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d)
HOMOGENEOUS += (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)  # type: ignore[assignment]


class BoundedReLU(nn.Module):
    """clip(x, 0, bound), a bound for each channel: a ReLU6 whose 6 can be divided. Axis 1 is the channel.

    Gradient: 1 on 0 <= x <= bound, else 0; none to the bound.
    """

    bound: Tensor

    def __init__(self, channels: int, bound: float = 6.0) -> None:
        super().__init__()
        self.register_buffer("bound", torch.full((channels,), bound))

    def forward(self, x: Tensor) -> Tensor:
        bound = self.bound.reshape(1, -1, *[1] * (x.dim() - 2))
        return ops.clip(x, torch.zeros_like(bound), bound)


def relu6(module: nn.Module, site: str, channels: int, becomes: str = "bound") -> nn.Module:
    """What stands in place of a ReLU6: `bound`, a BoundedReLU that gives the same; or `relu`, a ReLU as in the paper.

    Raises:
        ValueError: another word

    Reference: 1906.04721 (ReLU, which changes the float net)
    """
    return BoundedReLU(channels) if check_choice("relu6", becomes, ("bound", "relu")) == "bound" else nn.ReLU()


@dataclass(frozen=True)
class Chain:
    """Two layers of which the second alone reads the first, through nothing that keeps a channel's scale."""

    first: QuantLayer
    bounds: tuple[BoundedReLU, ...]
    second: QuantLayer


def chains(model: nn.Module) -> Iterator[Chain]:
    """All of them, in order."""
    consumers = surgery.pairs(model)
    for start, layer in quant_layers(model):
        bounds, place = [], start
        while (place := consumers.get(place, "")) and not isinstance(m := model.get_submodule(place), QuantLayer):
            if isinstance(m, BoundedReLU):
                bounds.append(m)
            elif not isinstance(m, HOMOGENEOUS):
                break
        if place and isinstance(m, QuantLayer) and _inputs(m) % layer.weight_shape[0] == 0:
            yield Chain(layer, tuple(bounds), m)


def _inputs(layer: QuantLayer) -> int:
    return layer.weight_shape[1] * (layer.groups if layer.conv else 1)


def by_input(layer: QuantLayer) -> Tensor:
    """The weight as a view of [groups, outputs, inputs, kernel], the inputs and outputs being those of a group."""
    groups = layer.groups if layer.conv else 1
    return layer.weight.reshape(groups, layer.weight_shape[0] // groups, layer.weight_shape[1], -1)


def factors(chain: Chain) -> Tensor:
    """s = sqrt(r1 r2) / r2 of each channel between the layers; 1 where r1 or r2 is 0.

    r1 and r2 are the largest sizes of the weights that give the channel and that read it. Reference: 1906.04721
    """
    r1 = chain.first.weight.flatten(1).abs().amax(1)
    r2 = by_input(chain.second).abs().amax((1, 3)).reshape(len(r1), -1).amax(1)
    return torch.where((r1 > 0) & (r2 > 0), (r1 * r2).sqrt() / r2, 1.0)


@torch.no_grad()
def scale(chain: Chain, s: Tensor) -> None:
    """Divide the channels between the layers by s: what gives them is divided, and what reads them multiplied."""
    first, second = chain.first, chain.second
    first.weight.div_(s.reshape(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.div_(s)
    if first.moments is not None:
        mean, std = first.moments
        first.moments = mean.to(s) / s, std.to(s) / s
    for bounded in chain.bounds:
        bounded.bound.div_(s)
    weight = by_input(second)
    read = s.repeat_interleave(_inputs(second) // len(s)).reshape(len(weight), 1, -1, 1)
    second.weight.copy_((weight * read).reshape(second.weight.shape))


@torch.no_grad()
def absorb(chain: Chain) -> bool:
    """Move c = max(0, mean - 3 std) of each channel between the layers into the second one's bias; False: it cannot.

    With a ReLU between them the float net's output changes where the channel lies below c, once in 740 values.
    Departure: not into a convolution that pads with zeros, as at its border there is no c to be put back.

    Reference: 1906.04721
    """
    first, second = chain.first, chain.second
    if first.moments is None or first.bias is None or second.bias is None or (second.conv and any(second.padding)):
        return False
    mean, std = (t.to(first.weight) for t in first.moments)
    c = (mean - 3 * std).clamp_min(0)
    for bounded in chain.bounds:
        c = torch.minimum(c, bounded.bound)
        bounded.bound.sub_(c)
    first.bias.sub_(c)
    first.moments = mean - c, std
    weight = by_input(second).sum(3)
    read = c.repeat_interleave(_inputs(second) // len(c)).reshape(len(weight), -1, 1)
    second.bias.add_((weight @ read).flatten())
    return True


class Equalize(Hook):
    """Once calibrated, make the weights of layers that follow each other equally large in each channel between them.

    In turns over all pairs, until no factor is off 1 by more than 1e-4 (at most 1000 turns). The float net gives what
    it gave before, to rounding, also with BoundedReLUs. Then all ranges are found again.

    Args:
        equalize: whether
        absorb: also move high biases into the next layer

    Raises:
        ValueError: absorb without equalize
        UserError: no two layers follow each other

    Reference: 1906.04721
    """

    TURNS, ENOUGH = 1000, 1e-4

    def __init__(self, equalize: bool = True, absorb: bool = False) -> None:
        super().__init__()
        if absorb and not equalize:
            raise ValueError("absorb=true is for equalize=true")
        self.equalize, self.absorb = equalize, absorb

    @torch.no_grad()
    def after_calibrate(self, state: State) -> None:
        if not self.equalize:
            return
        found = list(chains(state.model))
        if not found:
            raise UserError(
                "equalize=true: no two layers of this net follow each other with nothing but ReLUs and poolings "
                "between them; batch-norms must be folded (options.fold=BatchNorm*)"
            )
        for _ in range(self.TURNS):
            off = 0.0
            for chain in found:
                s = factors(chain)
                scale(chain, s)
                off = max(off, float((s - 1).abs().max()))
            if off < self.ENOUGH:
                break
        if self.absorb:
            for chain in found:
                absorb(chain)
        recalibrate(state.model, state.calibration.epoch(0))
