"""ResNet-18 and ResNet-34 for ImageNet."""

from torch import nn

from qbench.models.parts import check, he_init, named, scaled
from qbench.models.resnet import _stage

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class ResNetImageNet(nn.Sequential):
    """A 7x7 stem of stride 2, a pooling, and four stages of 64, 128, 256, 512 channels. (N, channels, size, size) ->
    (N, classes). The end is 7x7 at 224 pixels.

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels, at least 8
        depth: layers with weights: 18 or 34
        width: multiplier of all channels; 1.5 is the ResNet-18B of the ternary papers
        shortcut: where the shape changes, A: subsample and pad with zeros; B: 1x1 conv and batch-norm
        preactivation: batch-norm and ReLU before each conv (and after the last block) instead of behind it; None is no
        shortcut_per_conv: a shortcut around every conv instead of every two, for binary nets; None is no

    Raises:
        ValueError: an argument out of its range

    Reference: 1512.03385, table 1 (two-layer blocks, option B); 1603.05027 for the pre-activation form
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        size: int,
        depth: int = 18,
        width: float = 1.0,
        shortcut: str = "B",
        preactivation: bool | None = None,
        shortcut_per_conv: bool | None = None,
    ) -> None:
        check(channels, classes, size, width, smallest=8)
        if depth not in BLOCKS:
            raise ValueError(f"depth must be 18 or 34, got {depth}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be A or B, got {shortcut!r}")
        plan = [scaled(c, width) for c in (64, 128, 256, 512)]
        options = shortcut, bool(preactivation), bool(shortcut_per_conv)
        stages = {
            f"layer{i + 1}": _stage(plan[max(0, i - 1)], plan[i], 1 if i == 0 else 2, BLOCKS[depth][i], *options)
            for i in range(4)
        }
        pool = nn.MaxPool2d(3, 2, padding=1)
        stem = named(conv1=nn.Conv2d(channels, plan[0], 7, 2, padding=3, bias=False))
        if preactivation:
            body = {**stem, "pool1": pool, **stages, **named(bn=nn.BatchNorm2d(plan[3]), relu=nn.ReLU())}
        else:
            body = {**stem, **named(bn1=nn.BatchNorm2d(plan[0]), relu1=nn.ReLU(), pool1=pool), **stages}
        head = named(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(plan[3], classes))
        super().__init__(named(**body, **head))
        he_init(self)
