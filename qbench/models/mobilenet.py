"""MobileNets v1 and v2. Images of up to 64 pixels keep the stem and the next reduction at full size."""

from torch import Tensor, nn

from qbench.models.parts import Add, check, conv, he_init, named, scaled

SMALL = 64  # up to this side in pixels the total stride is 8 instead of 32


def _multiple_of_8(channels: int, width: float) -> int:
    """`channels * width` rounded to a multiple of 8, at least 8, and not below 0.9 of the product.

    Reference: 1801.04381, the authors' code (make_divisible)
    """
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def _separable(before: int, after: int, stride: int) -> nn.Sequential:
    """3x3 depthwise conv, batch-norm, ReLU, 1x1 conv, batch-norm, ReLU."""
    return nn.Sequential(
        named(
            conv1=conv(before, before, 3, stride, groups=before),
            bn1=nn.BatchNorm2d(before),
            relu1=nn.ReLU(),
            conv2=conv(before, after, 1),
            bn2=nn.BatchNorm2d(after),
            relu2=nn.ReLU(),
        )
    )


class MobileNetV1(nn.Sequential):
    """Thirteen depthwise-separable blocks. (N, channels, size, size) -> (N, classes).

    At 65 pixels and more the strides are the paper's (32 in all); below, the stem and the second block have stride 1.

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels, at least 8
        width: multiplier of all channels, the paper's alpha

    Raises:
        ValueError: an argument out of its range

    Reference: 1704.04861, table 1
    """

    def __init__(self, *, channels: int, classes: int, size: int, width: float = 1.0) -> None:
        check(channels, classes, size, width, smallest=8)
        early = 1 if size <= SMALL else 2
        plan = [(64, 1), (128, early), (128, 1), (256, 2), (256, 1), (512, 2)]
        plan += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
        stem = before = scaled(32, width)
        blocks: list[nn.Module] = []
        for planned, stride in plan:
            after = scaled(planned, width)
            blocks.append(_separable(before, after, stride))
            before = after
        modules = named(
            conv1=conv(channels, stem, 3, early),
            bn1=nn.BatchNorm2d(stem),
            relu1=nn.ReLU(),
            blocks=nn.Sequential(*blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(before, classes),
        )
        super().__init__(modules)
        he_init(self)


class InvertedResidual(nn.Module):
    """1x1 expansion by `expand` (left out at 1), 3x3 depthwise conv, linear 1x1 projection; plus x where shapes agree.

    (N, before, H, W) -> (N, after, H / stride, W / stride)

    Reference: 1801.04381, table 1 and figure 4(d)
    """

    def __init__(self, before: int, after: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = before * expand
        body = named()
        if expand != 1:
            body.update(conv1=conv(before, inner, 1), bn1=nn.BatchNorm2d(inner), relu1=nn.ReLU6())
        body.update(conv2=conv(inner, inner, 3, stride, groups=inner), bn2=nn.BatchNorm2d(inner), relu2=nn.ReLU6())
        body.update(conv3=conv(inner, after, 1), bn3=nn.BatchNorm2d(after))
        self.body = nn.Sequential(body)
        self.add = Add() if stride == 1 and before == after else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if self.add is None else self.add(y, x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Sequential):
    """Seventeen inverted residuals with linear bottlenecks and ReLU6. (N, channels, size, size) -> (N, classes).

    At 65 pixels and more the strides are the paper's (32 in all); below, the stem and the second stage have stride 1.
    Channels are rounded to multiples of 8, and the last conv never has fewer than 1280, as in the paper's code; its
    dropout before the classifier is left out.

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels, at least 8
        width: multiplier of all channels

    Raises:
        ValueError: an argument out of its range

    Reference: 1801.04381, table 2
    """

    def __init__(self, *, channels: int, classes: int, size: int, width: float = 1.0) -> None:
        check(channels, classes, size, width, smallest=8)
        early = 1 if size <= SMALL else 2
        # expansion, channels, blocks, stride of the first block
        plan = [(1, 16, 1, 1), (6, 24, 2, early), (6, 32, 3, 2), (6, 64, 4, 2)]
        plan += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
        stem = before = _multiple_of_8(32, width)
        last = _multiple_of_8(1280, max(1.0, width))
        blocks: list[nn.Module] = []
        for expand, planned, repeats, stride in plan:
            after = _multiple_of_8(planned, width)
            for i in range(repeats):
                blocks.append(InvertedResidual(before, after, stride if i == 0 else 1, expand))
                before = after
        modules = named(
            conv1=conv(channels, stem, 3, early),
            bn1=nn.BatchNorm2d(stem),
            relu1=nn.ReLU6(),
            blocks=nn.Sequential(*blocks),
            conv2=conv(before, last, 1),
            bn2=nn.BatchNorm2d(last),
            relu2=nn.ReLU6(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(last, classes),
        )
        super().__init__(modules)
        he_init(self)
