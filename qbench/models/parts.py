"""What the networks are built of: small named modules, the width multiplier, He initialization.

Every ReLU, addition, pooling and flatten of a network is a module of its own, used once, and modules are registered in
the order in which they run; folding, fusion and export read the networks that way.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Add(nn.Module):
    """x + y, as a module, so that a residual addition has a name. Both of the same shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class _Shortcut(torch.autograd.Function):
    """A slice with zeros round it; the gradient of torch's slice is not channels_last, and copied wherever it goes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int, front: int, back: int) -> Tensor:
        ctx.like = x.shape, stride, front
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, front, back))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        shape, stride, front = ctx.like
        (g,) = grads
        last = g.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        dx = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout).zero_()
        dx[:, :, ::stride, ::stride] = g[:, front : front + shape[1]]
        return dx, None, None, None


class ShortcutA(nn.Module):
    """The parameter-free shortcut: take every `stride`-th pixel, fill the new channels with zeros on both sides.

    (N, before, H, W) -> (N, after, ceil(H / stride), ceil(W / stride)).

    Reference: 1512.03385, section 4.2, option A
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        if after < before or stride < 1:
            raise ValueError(f"ShortcutA needs after >= before and stride >= 1, got {before} -> {after}, {stride=}")
        self.stride = stride
        self.front = (after - before) // 2
        self.back = after - before - self.front

    def forward(self, x: Tensor) -> Tensor:
        return _Shortcut.apply(x, self.stride, self.front, self.back)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        return f"stride={self.stride}, front={self.front}, back={self.back}"


def named(**modules: nn.Module) -> OrderedDict[str, nn.Module]:
    """The argument of `nn.Sequential` that gives its modules names."""
    return OrderedDict(modules)


def conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A conv that keeps the image size at stride 1 (odd kernel); without bias, as a batch-norm follows."""
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded, at least 1."""
    return max(1, round(channels * width))


def he_init(model: nn.Module) -> None:
    """He initialization of every conv: weights from N(0, 2 / fan_out), biases 0. Linear layers keep torch's own.

    fan_out is the number of outputs that one input pixel reaches: kernel area * output channels / groups. It equals
    `nn.init.kaiming_normal_(mode="fan_out")`, which forgets the groups of a depthwise conv.

    Reference: 1502.01852, equation 14
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check(channels: int, classes: int, size: int, width: float, smallest: int) -> None:
    """Refuse a network that cannot be built: what the data set gives, the width, the smallest image side in pixels."""
    if channels < 1 or classes < 1:
        raise ValueError(f"channels and classes must be >= 1, got {channels=}, {classes=}")
    if size < smallest:
        raise ValueError(f"size must be >= {smallest} pixels for this network, got {size}")
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width must be a positive number, got {width}")
