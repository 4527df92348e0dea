"""VGG-small, the CIFAR network of the papers on binary and few-bit nets."""

from torch import nn

from qbench.models.parts import check, conv, he_init, named, scaled


class VGGSmall(nn.Sequential):
    """128-128-M-256-256-M-512-512-M-FC: 3x3 convs with batch-norm. (N, channels, size, size) -> (N, classes).

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels, at least 8
        width: multiplier of all channels
        preactivation: true: conv - pool - batch-norm - ReLU, so that a batch-norm and activation stand right
            before each next conv and pooling sees no binary values (a maximum of signs is nearly always +1);
            None or false: conv - batch-norm - ReLU - pool

    Raises:
        ValueError: an argument out of its range

    Reference: 1807.10029 (LQ-Nets), the authors' code; 1603.05279, section 3.2, for the order
    """

    def __init__(
        self, *, channels: int, classes: int, size: int, width: float = 1.0, preactivation: bool | None = None
    ) -> None:
        check(channels, classes, size, width, smallest=8)
        pool_first = bool(preactivation)
        modules = named()
        before = channels
        for i, planned in enumerate((128, 128, 256, 256, 512, 512), start=1):
            after = scaled(planned, width)
            pool = named(**{f"pool{i // 2}": nn.MaxPool2d(2)} if i % 2 == 0 else {})
            activation = named(**{f"bn{i}": nn.BatchNorm2d(after), f"relu{i}": nn.ReLU()})
            modules[f"conv{i}"] = conv(before, after, 3)
            modules.update({**pool, **activation} if pool_first else {**activation, **pool})
            before = after
        modules.update(flatten=nn.Flatten(), fc=nn.Linear(before * (size // 8) ** 2, classes))
        super().__init__(modules)
        he_init(self)
