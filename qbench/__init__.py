"""qbench: run quantization papers from one command and set the published numbers beside our own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from torch.nn import Module

__version__ = "0.1.0"


def load(run: "str | PathLike[str]") -> "Module":
    """The trained, quantized net of a finished run (its folder in outputs/), in eval mode."""
    from pathlib import Path

    from qbench.training.finished import rebuild

    return rebuild(Path(run))
