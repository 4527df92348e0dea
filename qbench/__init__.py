"""qbench: run quantization papers from one command and set the published numbers beside our own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from torch.nn import Module

__version__ = "0.1.0"


def load(run: "str | PathLike[str]", allow: "Sequence[str]" = ()) -> "Module":
    """The trained, quantized net of a finished run (its folder in outputs/) or of a packed file, in eval mode.

    From either only qbench's own classes, torch.nn, torch.optim and torchvision.models are built. `allow` names
    further packages of which the net may be built; as it can run their code, only where you trust the folder or file.

    Errors: qbench.errors.UserError naming the file that is missing or damaged, or what may not be built.
    """
    from pathlib import Path

    from qbench.training.finished import rebuild

    return rebuild(Path(run), allow)
