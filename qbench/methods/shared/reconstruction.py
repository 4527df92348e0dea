"""Making a layer or block of a quantized net give what the float net's gives: what is learned by itself, and how.

Reference: 2004.10568 (layer by layer); 2102.05426 (block by block, Fisher weights)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.quant import surgery
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import evaluating

KINDS = ("layer", "block")
PIECE = 256  # images at a time where nothing is learned


def units(model: nn.Module, kind: str, quantizer: type) -> Iterator[str]:
    """Names, in order, of the layers with a weight quantizer of this class; with kind=block of the blocks they are in.

    A block is the outermost module below the net that is no mere sequence; a layer outside of all is one by itself.
    """

    def walk(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            if any(isinstance(m, quantizer) for m in child.modules()):
                block = kind == "block" and not isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
                yield from [path + name] if block or isinstance(child, QuantLayer) else walk(child, f"{path}{name}.")

    return walk(model, "")


def activation_of(model: nn.Module, name: str) -> nn.Module:
    """The ReLU that alone reads what the layer gives; the identity where a sum, a pooling or a batch-norm comes first.

    Reference: f_a of 2004.10568 Eq. 25
    """
    consumers = surgery.pairs(model)
    while name in consumers:
        name = consumers[name]
        module = model.get_submodule(name)
        if not isinstance(module, nn.Identity):
            return module if isinstance(module, (nn.ReLU, nn.ReLU6)) else nn.Identity()
    return nn.Identity()


def fisher(model: nn.Module, unit: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """(dL/dz)^2 of each value z that the unit gives, over the mean of all; L is the cross-entropy of z's own image.

    The shape is that of the output in `passes.layer_io`. Reference: 2102.05426 Eq. 10; that their mean is 1 is ours, so
    that the regulariser keeps its weight. For L the authors' code has the divergence from the float net's classes,
    which needs no labels, and it adds 1 to |dL/dz|.
    """
    found: list[Tensor] = []

    def cut(module: nn.Module, args: Any, z: Tensor) -> Tensor:
        found.append(z.detach().requires_grad_())
        return found[-1].clone()

    handle = unit.register_forward_hook(cut)
    try:
        with evaluating(model):
            for x, labels in batches:
                loss = F.cross_entropy(model(x), labels, reduction="sum")
                found[-1] = torch.autograd.grad(loss, found[-1])[0].square()
    finally:
        handle.remove()
    weights = torch.cat(found)
    return weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)


@torch.no_grad()
def whole(error: Callable[[Tensor], Tensor], images: int, device: torch.device) -> float:
    """The mean over all images of `error(their indices)`, itself a mean over images."""
    pieces = torch.arange(images, device=device).split(PIECE)
    return sum(float(error(piece)) * len(piece) for piece in pieces) / images


def minimise(
    groups: Sequence[Mapping[str, Any]],
    loss: Callable[[int, Tensor], Tensor],
    iterations: int,
    batch_size: int,
    images: int,
    generator: torch.Generator,
) -> None:
    """Adam on the parameter groups; iteration i minimises `loss(i, indices)` of images drawn without replacement.

    No other parameter gets a gradient.
    """
    optimizer = torch.optim.Adam([dict(group) for group in groups])
    learned = [p for group in groups for p in group["params"]]
    for i in range(iterations):
        chosen = torch.randperm(images, generator=generator, device=generator.device)[:batch_size]
        for p, gradient in zip(learned, torch.autograd.grad(loss(i, chosen), learned), strict=True):
            p.grad = gradient
        optimizer.step()
    for p in learned:
        p.grad = None
