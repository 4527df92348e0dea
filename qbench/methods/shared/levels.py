"""Values on a few levels that are not equally spaced."""

import torch
from torch import Tensor


def places(x: Tensor, ends: Tensor) -> Tensor:
    """How many of the rising `ends`, [n], lie below each x: place i is ends[i - 1] < x <= ends[i]. Shape of x."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):  # else it would be copied
        return torch.bucketize(x.permute(0, 2, 3, 1), ends).permute(0, 3, 1, 2)
    return torch.bucketize(x.contiguous(), ends)
