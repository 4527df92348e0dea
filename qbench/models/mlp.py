"""A fully connected network."""

from collections.abc import Sequence

from torch import nn

from qbench.models.parts import check, named, scaled


class MLP(nn.Sequential):
    """Flatten, then Linear - ReLU for each hidden layer, then Linear. (N, channels, size, size) -> (N, classes).

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels
        hidden: units of each hidden layer; none is a linear classifier
        width: multiplier of the hidden units

    Raises:
        ValueError: an argument out of its range
    """

    def __init__(
        self, *, channels: int, classes: int, size: int, hidden: Sequence[int] = (512, 512), width: float = 1.0
    ) -> None:
        check(channels, classes, size, width, smallest=1)
        if any(units < 1 for units in hidden):
            raise ValueError(f"hidden must hold numbers >= 1, got {list(hidden)}")
        modules = named(flatten=nn.Flatten())
        before = channels * size * size
        for i, units in enumerate(hidden, start=1):
            after = scaled(units, width)
            modules.update({f"fc{i}": nn.Linear(before, after), f"relu{i}": nn.ReLU()})
            before = after
        super().__init__(named(**modules, fc=nn.Linear(before, classes)))
