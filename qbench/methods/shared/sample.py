"""What a quantizer keeps of the calibration images."""

import torch
from torch import Tensor


class Sample:
    """Some values of each calibration batch, for a range that is found from all of them."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Keep about 16384 values of the batch, an odd stride apart so that no row or column is favoured."""
        self.parts.append(x.detach().flatten()[:: (x.numel() >> 14) | 1].float())

    def take(self) -> Tensor | None:
        """All that was kept, [n], which is then forgotten; None where there was nothing."""
        found = torch.cat(self.parts) if self.parts else None
        self.parts = []
        return found
