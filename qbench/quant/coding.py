"""Codes from what is stored in their place: by words alone, for readers that do not know the quantizer.

`Quantizer.coding` says which of these it is:
  {"kind": "codes"}     the part "codes" holds the codes, counted from the grid's lowest
  {"kind": "floats"}    the part "weights" holds the values themselves; there are no codes
  {"kind": "xor", "bits": NAME, "order": "slices" or "gates"}
                        the part NAME holds bits that go through XOR gates, whose wiring is what the quantizer shares
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qbench.quant.grid import Grid, Planes
from qbench.quant.packing import Part


def decode(
    coding: Mapping[str, str], parts: Mapping[str, Part], wiring: Part | None, shape: tuple[int, ...], grid: Grid
) -> Tensor:
    """The codes, int32, that `parts` stand for under `coding`; `shape` is the weight's.

    Errors: ValueError on a kind that has no codes, KeyError on a part that is missing.
    """
    if coding["kind"] == "codes":
        return grid.unpack(parts["codes"])
    if coding["kind"] != "xor" or not isinstance(grid, Planes) or wiring is None:
        raise ValueError(f"coding {coding['kind']!r} gives no codes of this grid")
    count = torch.Size(shape).numel()
    bits = gates(parts[coding["bits"]].numbers, wiring.numbers, len(grid.coefficients))
    if "patches" in parts:
        flat = bits.flatten(0, 1)
        rows = torch.arange(len(flat)).repeat_interleave(parts["patch_counts"].numbers)
        flat[rows, parts["patches"].numbers] ^= True
    ordered = {"slices": bits, "gates": bits.mT}[coding["order"]].flatten(1)[:, :count]
    codes = Planes.join(ordered.reshape(-1, *shape))
    return codes.masked_fill(~mask_of(parts, torch.Size(shape)), int(grid.hi)) if grid.pruned else codes


def gates(bits: Tensor, wiring: Tensor, planes: int) -> Tensor:
    """y = M b over GF(2) for each plane and slice: bool [planes, slices, n_out].

    bits: zeros and ones [planes, slices, n_in], or both first axes in one. wiring: M [n_out, n_in], or one a plane.
    """
    b = bits.reshape(planes, -1, bits.shape[-1]).float()
    return (b @ wiring.float().mT).remainder(2).bool()


def mask_parts(kept: Tensor) -> dict[str, Part]:
    """Which weights are kept: the shorter of one bit each and Rice-coded gaps, whose parameter k takes 5 bits.

    kept: bool, any shape. A gap g, the number of pruned weights before a kept one, takes g >> k zeros, a one and the k
    lowest bits of g, the lowest first.
    """
    places = torch.cat([torch.tensor([-1]), kept.flatten().nonzero().flatten().cpu()])
    gaps = places.diff() - 1
    rice = [int((gaps >> k).sum()) + len(gaps) * (1 + k) for k in range(32)]
    k = rice.index(min(rice))
    if rice[k] + 5 >= kept.numel():
        return {"mask": Part(kept.flatten().to(torch.int32), 1)}
    bits = torch.zeros(rice[k], dtype=torch.int32)
    ones = ((gaps >> k) + 1 + k).cumsum(0) - 1 - k
    bits[ones] = 1
    for i in range(k):
        bits[ones + 1 + i] = (gaps >> i & 1).int()
    return {"gaps": Part(bits, 1), "rice": Part(torch.tensor([k]), 5)}


def mask_of(parts: Mapping[str, Part], shape: torch.Size) -> Tensor:
    """The inverse of `mask_parts`, bool of `shape`."""
    if "mask" in parts:
        return parts["mask"].numbers.bool().view(shape)
    bits, k = parts["gaps"].numbers.tolist(), int(parts["rice"].numbers)
    steps, place = [], 0
    while place < len(bits):
        one = bits.index(1, place)
        steps.append(((one - place) << k) + sum(bits[one + 1 + i] << i for i in range(k)) + 1)
        place = one + 1 + k
    kept = torch.zeros(shape.numel(), dtype=torch.bool)
    kept[torch.tensor(steps, dtype=torch.long).cumsum(0) - 1] = True
    return kept.view(shape)
