"""A network for tests that has every part once."""

from torch import Tensor, nn

from qbench.models.parts import Add, check, conv, he_init, scaled


class Tiny(nn.Module):
    """A stem, one residual 3x3 conv with batch-norm, a classifier; 8 channels.

    (N, channels, size, size) -> (N, classes)

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels, at least 2
        width: multiplier of the channels

    Raises:
        ValueError: an argument out of its range
    """

    def __init__(self, *, channels: int, classes: int, size: int, width: float = 1.0) -> None:
        check(channels, classes, size, width, smallest=2)
        super().__init__()
        inner = scaled(8, width)
        self.conv1 = conv(channels, inner, 3)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(inner, inner, 3)
        self.bn2 = nn.BatchNorm2d(inner)
        self.add = Add()
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inner, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.add(self.bn2(self.conv2(x)), x))
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]
