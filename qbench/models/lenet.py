"""LeNet-5 as the papers on ternary and binary weights use it on MNIST."""

from torch import nn

from qbench.models.parts import check, he_init, named, scaled


class LeNet5(nn.Sequential):
    """32C5-MP2-64C5-MP2-512FC-classes, ReLU after each conv and the hidden layer.

    (N, channels, size, size) -> (N, classes). The papers do not say whether the convs are padded.

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels, at least 4 with padding and 16 without
        width: multiplier of the channels and of the hidden layer
        batch_norm: put a batch-norm (in place of the bias) before each ReLU; None is no
        pool_first: conv - pool - batch-norm - ReLU, where None or false is conv - batch-norm - ReLU - pool
        padding: 2 keeps the image size (28 pixels come down to 14 and 7); 0 shrinks it (12 and 4), as the code of the
            TWN authors does

    Raises:
        ValueError: an argument out of its range

    Reference: 1605.04711, section 3 (32-C5 + MP2 + 64-C5 + MP2 + 512FC)
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        size: int,
        width: float = 1.0,
        batch_norm: bool | None = None,
        pool_first: bool | None = None,
        padding: int = 2,
    ) -> None:
        if padding not in (0, 2):
            raise ValueError(f"padding must be 0 or 2, got {padding}")
        check(channels, classes, size, width, smallest=4 if padding else 16)
        one, two, hidden = (scaled(c, width) for c in (32, 64, 512))
        side = ((size + 2 * padding - 4) // 2 + 2 * padding - 4) // 2
        bias = not batch_norm

        def norm(name: str, layer: nn.Module) -> dict[str, nn.Module]:
            return {name: layer} if batch_norm else {}

        def behind(i: int, channels: int) -> dict[str, nn.Module]:
            pool: dict[str, nn.Module] = {f"pool{i}": nn.MaxPool2d(2)}
            activation = {**norm(f"bn{i}", nn.BatchNorm2d(channels)), f"relu{i}": nn.ReLU()}
            return {**pool, **activation} if pool_first else {**activation, **pool}

        modules = named(
            conv1=nn.Conv2d(channels, one, 5, padding=padding, bias=bias),
            **behind(1, one),
            conv2=nn.Conv2d(one, two, 5, padding=padding, bias=bias),
            **behind(2, two),
            flatten=nn.Flatten(),
            fc1=nn.Linear(two * side * side, hidden, bias=bias),
            **norm("bn3", nn.BatchNorm1d(hidden)),
            relu3=nn.ReLU(),
            fc=nn.Linear(hidden, classes),
        )
        super().__init__(modules)
        he_init(self)
