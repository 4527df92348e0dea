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
        batch_norm: put a batch-norm (in place of the bias) before each ReLU; None is no
        dropout: share of the units behind each ReLU that a training step leaves out
        dropout_in: the same of the pixels

    Raises:
        ValueError: an argument out of its range

    Reference: 1511.00363, section 3.1, and 1602.02830, section 2.1, for three hidden layers with batch-norm
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        size: int,
        hidden: Sequence[int] = (512, 512),
        width: float = 1.0,
        batch_norm: bool | None = None,
        dropout: float | None = None,
        dropout_in: float | None = None,
    ) -> None:
        check(channels, classes, size, width, smallest=1)
        if any(units < 1 for units in hidden):
            raise ValueError(f"hidden must hold numbers >= 1, got {list(hidden)}")
        for name, share in (("dropout", dropout), ("dropout_in", dropout_in)):
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {share}")
        modules = named(flatten=nn.Flatten())
        if dropout_in:
            modules["dropout0"] = nn.Dropout(dropout_in)
        before = channels * size * size
        for i, units in enumerate(hidden, start=1):
            after = scaled(units, width)
            modules[f"fc{i}"] = nn.Linear(before, after, bias=not batch_norm)
            if batch_norm:
                modules[f"bn{i}"] = nn.BatchNorm1d(after)
            modules[f"relu{i}"] = nn.ReLU()
            if dropout:
                modules[f"dropout{i}"] = nn.Dropout(dropout)
            before = after
        super().__init__(named(**modules, fc=nn.Linear(before, classes)))
