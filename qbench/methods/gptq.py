"""GPTQ: weights rounded column by column, what each rounding does to the output made good by those still to come.

Reference: 2210.17323
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import UserError
from qbench.methods.shared.reconstruction import units
from qbench.quant import ranges
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Done, State
from qbench.quant.passes import visits
from qbench.quant.uniform import Uniform


class Weight(Uniform):
    """The usual grid of the float weight; what is chosen on it takes the weight's place, which then is on the grid."""


def columns(layer: QuantLayer, x: Tensor) -> Tensor:
    """What each output is a product of, [groups, weights of an output, images and places]: a convolution's unfolded.

    Errors: UserError on padding that is given as a word.
    """
    if not layer.conv:
        return x.reshape(-1, x.shape[-1]).T[None]
    if isinstance(layer.padding, str):
        raise UserError(
            f"gptq unfolds a convolution's input: its padding must be given in numbers, got {layer.padding!r}"
        )
    kernel = layer.weight_shape[2:]
    patches = F.unfold(x, kernel, layer.dilation, layer.padding, layer.stride)
    grouped: Tensor = patches.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3)
    return grouped.flatten(2)


def second_moments(layer: QuantLayer, inputs: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """E[x x^T] of the `columns` of what a layer computes on, float64 [groups, n, n]: half the Hessian of its error."""
    total, count = torch.zeros((), dtype=torch.double), 0
    for x, _ in inputs:
        q = layer.input_quantizer
        seen = columns(layer, x if q is None else q(x))
        total = total.to(x.device) + (seen @ seen.mT).double()
        count += seen.shape[2]
    return total / count


def rounded(w: Tensor, step: Tensor, zero: Tensor, bounds: tuple[int, int]) -> Tensor:
    """The nearest code less zero of each weight."""
    return ranges.codes(w, step, zero).clamp_(*bounds).sub_(zero)


def compensate(
    w: Tensor,
    h: Tensor,
    step: Tensor,
    zero: Tensor,
    bounds: tuple[int, int],
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> Tensor:
    """The codes, less zero, of weights that are rounded one column after the other.

    With U the upper Cholesky factor of h^-1, column i is rounded, e_i = (w_i - q_i) / U_ii, and the columns behind it
    are moved, w_j <- w_j - e_i U_ij: those of its block at once, the others when the block is done, which changes
    nothing but the speed.

    Args:
        w: [groups, rows, n]; h: [groups, n, n], of all rows of a group
        step, zero: as w
        damp: added to h's diagonal, as a share of its mean
        block: columns of a block
        act_order: columns of a larger diagonal come first, instead of in their order

    Errors: UserError where h has no inverse.
    Reference: 2210.17323, Algorithm 1; act_order as in the authors' code
    """
    diagonal = h.diagonal(dim1=1, dim2=2)
    h = h + torch.diag_embed(damp * diagonal.mean(1, keepdim=True) + (diagonal == 0))  # an input of nothing but zeros
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    if not act_order:
        order = torch.arange(h.shape[1], device=h.device).expand_as(order)
    rows = order[:, None].expand_as(w)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h))
    w, step, zero = (t.gather(2, rows).double() for t in (w, step, zero))
    try:
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h))).mT
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise UserError("gptq: the inputs of a layer depend on each other; use options.damp above 0") from error
    found = torch.empty_like(w)
    for first in range(0, w.shape[2], block):
        last = min(first + block, w.shape[2])
        errors = torch.empty_like(w[:, :, first:last])
        for i in range(first, last):
            found[:, :, i] = rounded(w[:, :, i], step[:, :, i], zero[:, :, i], bounds)
            e = (w[:, :, i] - found[:, :, i] * step[:, :, i]) / upper[:, i, i, None]
            w[:, :, i:last] -= e[:, :, None] * upper[:, None, i, i:last]
            errors[:, :, i - first] = e
        w[:, :, last:] -= errors @ upper[:, first:last, last:]
    return torch.empty_like(found).scatter_(2, rows, found)


class Compensate:
    """Acts layer by layer, on inputs from the layers that are done: its weights become those that `compensate` finds.

    Ours: an output whose error, of all calibration images, is not less than with its nearest weights, keeps these. The
    grids are those of the float weights; in the paper those of groups are found as the groups are reached.

    Args:
        damp, block, act_order: see `compensate`

    Raises:
        ValueError: damp below 0, or block below 1

    Reference: 2210.17323
    """

    def __init__(self, *, damp: float = 0.01, block: int = 128, act_order: bool = False) -> None:
        if damp < 0 or block < 1:
            raise ValueError(f"damp must be at least 0 and block at least 1, got {damp} and {block}")
        self.damp, self.block, self.act_order = damp, block, act_order

    def __call__(self, state: State) -> Iterator[Done]:
        names = list(units(state.model, "layer", Weight))
        for name in names[state.stage.step :]:
            layer = state.model.get_submodule(name)
            assert isinstance(layer, QuantLayer)
            yield Done(name, len(names), self.layer_done(layer, visits(state.model, layer, state.calibration.epoch(0))))

    @torch.no_grad()
    def layer_done(self, layer: QuantLayer, inputs: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Choose the weights of one layer; the mean squared error of its output, summed over its channels."""
        q = layer.weight_quantizer
        assert isinstance(q, Weight)
        h = second_moments(layer, inputs)
        grid, whole = q.grid(), q.view or layer.weight_shape
        shape = (len(h), layer.weight_shape[0] // len(h), -1)
        step, zero = (t.expand(whole).reshape(shape) for t in (grid.step, grid.zero))
        w = layer.weight.reshape(shape)
        options = {"damp": self.damp, "block": self.block, "act_order": self.act_order}
        found = compensate(w, h, step, zero, q.bounds, **options).to(w.dtype) * step  # type: ignore[arg-type]
        nearest = rounded(w, step, zero, q.bounds) * step
        errors = [torch.einsum("gri,gij,grj->gr", d, h, d) for d in ((x - w).double() for x in (nearest, found))]
        kept = torch.where((errors[1] < errors[0])[:, :, None], found, nearest)
        layer.weight.copy_(kept.reshape(layer.weight_shape))
        return {"nearest": float(errors[0].sum()), "gptq": float(torch.minimum(*errors).sum())}
