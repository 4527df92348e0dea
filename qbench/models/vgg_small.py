"""VGG-small and its kin with hidden layers, the CIFAR networks of the papers on binary and few-bit nets."""

from collections.abc import Sequence

from torch import nn

from qbench.models.parts import check, conv, he_init, named, scaled


class VGGSmall(nn.Sequential):
    """128-128-M-256-256-M-512-512-M-FC: 3x3 convs with batch-norm. (N, channels, size, size) -> (N, classes).

    With hidden=[1024] it is the VGG-7 of the TWN paper, with [1024, 1024] the net of BinaryConnect and BNN that others
    call VGG-10 (it has nine layers).

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels, at least 8
        width: multiplier of all channels and hidden units
        preactivation: true: conv - pool - batch-norm - ReLU, so that a batch-norm and activation stand right
            before each next conv and pooling sees no binary values (a maximum of signs is nearly always +1);
            None or false: conv - batch-norm - ReLU - pool
        pool_first: true: the same order, for who asks nothing of nets with residuals
        hidden: units of each hidden layer, linear - batch-norm - ReLU, between the convs and the last layer

    Raises:
        ValueError: an argument out of its range

    Reference: 1807.10029 (LQ-Nets), the authors' code; 1605.04711, table 1; 1511.00363, section 3.2; 1603.05279,
        section 3.2, for the order
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        size: int,
        width: float = 1.0,
        preactivation: bool | None = None,
        pool_first: bool | None = None,
        hidden: Sequence[int] = (),
    ) -> None:
        check(channels, classes, size, width, smallest=8)
        if any(units < 1 for units in hidden):
            raise ValueError(f"hidden must hold numbers >= 1, got {list(hidden)}")
        pool_first = bool(preactivation or pool_first)
        modules = named()
        before = channels
        for i, planned in enumerate((128, 128, 256, 256, 512, 512), start=1):
            after = scaled(planned, width)
            pool = named(**{f"pool{i // 2}": nn.MaxPool2d(2)} if i % 2 == 0 else {})
            activation = named(**{f"bn{i}": nn.BatchNorm2d(after), f"relu{i}": nn.ReLU()})
            modules[f"conv{i}"] = conv(before, after, 3)
            modules.update({**pool, **activation} if pool_first else {**activation, **pool})
            before = after
        modules["flatten"] = nn.Flatten()
        before *= (size // 8) ** 2
        for i, units in enumerate(hidden, start=1):
            after = scaled(units, width)
            modules[f"fc{i}"] = nn.Linear(before, after, bias=False)
            modules.update({f"bn{i + 6}": nn.BatchNorm1d(after), f"relu{i + 6}": nn.ReLU()})
            before = after
        super().__init__(named(**modules, fc=nn.Linear(before, classes)))
        he_init(self)
