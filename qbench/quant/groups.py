"""Equal steps between two ends, in as many codes as each group of weights has bits for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.quant.grid import Affine
from qbench.quant.packing import Part


@dataclass(frozen=True, kw_only=True)
class Groups(Affine):
    """value = least + code * step, codes 0..hi = 2^b - 1 with a b of each group; step = (greatest - least) / hi.

    A packed file holds both ends and the b of each group, counted from the `fewest` bits that a group may have, in as
    few bits as the largest of them takes, which one byte names. The steps follow.
    """

    least: Tensor
    greatest: Tensor
    fewest: int

    def values(self, codes: Tensor) -> Tensor:
        return (self.least + self._seen(codes) * self.step).reshape(codes.shape)

    def codes(self, value: Tensor, source: Tensor) -> Tensor:
        place = (self._seen(value) - self.least) / self.step.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.minimum(place.round(), torch.as_tensor(self.hi)).to(torch.int32).reshape(value.shape)

    def tables(self, encoder: bool = False) -> dict[str, Part]:
        more = torch.as_tensor(self.width) - self.fewest
        width = int(more.max()).bit_length()
        found = {"ends": Part(torch.stack([self.least, self.greatest])), "width": Part(torch.tensor([width]), 8)}
        return found | ({"bits": Part(more, width)} if width else {})

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.least.expand(self.step.shape), self.least + self.hi * self.step
