"""Lossless XOR-gate encryption of pruned binary codes, after training. Reference: arXiv 1905.10138"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.methods.shared import xor_spec
from qbench.methods.shared.xor_spec import XorSpec
from qbench.quant.coding import mask_of, mask_parts
from qbench.quant.grid import Planes, planes
from qbench.quant.layers import QuantLayer
from qbench.quant.packing import Part
from qbench.quant.quantizer import Quantizer, check_bits

ROUNDS = 10  # of the alternating fit; a plane or two settle in three
MOST_INPUTS = 62  # an equation is kept in one integer: its inputs and its right-hand side


@dataclass(frozen=True)
class Encrypted:
    """What stands for the codes: `seeds` [slices, n_in] go through the gates, then `patches` [slices, n_out] flip."""

    seeds: Tensor
    patches: Tensor

    def parts(self) -> dict[str, Part]:
        """The seeds; of the patches, where there are any, the number in each slice and the place of each."""
        found = {"seeds": Part(self.seeds.to(torch.int32), 1)}
        counts = self.patches.sum(1)
        if counts.any():
            places = self.patches.nonzero()[:, 1]
            found["patch_counts"] = Part(counts, int(counts.max()).bit_length())
            found["patches"] = Part(places, max(1, (self.patches.shape[1] - 1).bit_length()))
        return found

    @classmethod
    def of(cls, parts: dict[str, Part], n_out: int) -> "Encrypted":
        """The inverse of `parts`."""
        seeds = parts["seeds"].numbers.bool()
        patches = torch.zeros(len(seeds), n_out, dtype=torch.bool)
        if "patches" in parts:
            rows = torch.arange(len(seeds)).repeat_interleave(parts["patch_counts"].numbers)
            patches[rows, parts["patches"].numbers] = True
        return cls(seeds, patches)


def rows_of(spec: XorSpec) -> list[int]:
    """The equations of the gates: bit i of a row says whether the gate reads input i."""
    return [sum(1 << i for i in row) for row in xor_spec.wiring(spec, 0)]


def matrix_of(spec: XorSpec) -> Tensor:
    """The gates as zeros and ones, int64 [n_out, n_in]."""
    return torch.tensor(rows_of(spec)).unsqueeze(1) >> torch.arange(spec.n_in) & 1


def encrypt(bits: Tensor, care: Tensor, spec: XorSpec) -> Encrypted:
    """Seeds whose gates give `bits` wherever `care`, but for the patches; both bool [slices, n_out].

    Slice by slice M_care x = bits_care is solved over GF(2), all slices at once: input after input is eliminated from
    all equations but one. An equation whose inputs are all gone and whose result is 1 contradicts the others: it is
    left out and patched. Inputs that no equation settles are 0.
    """
    slices = torch.arange(len(bits))
    equations = torch.where(care, torch.tensor(rows_of(spec)) + (bits.long() << spec.n_in), 0)  # bit n_in: the result
    free, pivots, solvable = care.clone(), [], []
    for k in range(spec.n_in):
        has = (equations >> k & 1).bool()
        found, pivot = (has & free).max(1)
        own = slices[found], pivot[found]
        has[own] = free[own] = False
        equations ^= (equations[slices, pivot] * found).unsqueeze(1) * has
        pivots.append(pivot)
        solvable.append(found)
    results = equations >> spec.n_in
    seeds = torch.stack([results[slices, pivot] * found for pivot, found in zip(pivots, solvable, strict=True)], 1)
    return Encrypted(seeds.bool(), free & (equations != 0))


def decrypt(encrypted: Encrypted, spec: XorSpec) -> Tensor:
    """M x over GF(2), patches flipped: bool [slices, n_out]; where nobody cares the bits are whatever comes out."""
    return ((encrypted.seeds.float() @ matrix_of(spec).float().T) % 2).bool() ^ encrypted.patches


class PrunedCode(Quantizer):
    """W = mask * sum_i alpha_i b_i with b_i in {-1, +1}, one alpha per output channel and plane, stored encrypted.

    Calibration keeps the round((1 - sparsity) * n) largest weights of the layer and fits alpha and b to them by turns:
    b is the nearest value, alpha the least-squares scale. `stored` encrypts the planes, slice by slice of n_out
    weights, decodes them again, and counts seeds, patches and mask; the forward pass needs none of that, since nothing
    is lost. The mask is coded apart: the gates alone cannot say which weights are pruned.

    Trained further, kept weights get the gradient of their values (straight through), pruned ones none; the mask stays.

    bits: of a weight before encryption, one of the mask and bits - 1 planes. sparsity: share of pruned weights. n_in,
    n_out: stored bits and weight bits of a slice; n_out None is 0.85 n_in / (1 - sparsity), so that most slices need no
    patch. Each connection of the gates is drawn with probability 1/2 from `matrix_seed`.

    Errors: ValueError on a range. RuntimeError if decoding should ever give other codes.
    Reference: arXiv 1905.10138; pruning and fit are the caller's there, and the numbers of the wiring its choice
    """

    granularity = "per_channel"
    mask: Tensor

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 2,
        sparsity: float = 0.9,
        n_in: int = 20,
        n_out: int | None = None,
        matrix_seed: int = 0,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 5)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in 0..1, below 1, got {sparsity!r}")
        if n_out is None:
            n_out = max(n_in, math.floor(0.85 * n_in / (1 - sparsity)))
        self.spec = XorSpec(n_in, n_out, None, matrix="random", seed=matrix_seed)
        if n_in > MOST_INPUTS:
            raise ValueError(f"n_in must be at most {MOST_INPUTS}, got {n_in}")
        self.sparsity, self.planes = sparsity, self.bits - 1
        ones = torch.ones(self.planes, layer.weight.shape[0], *[1] * (layer.weight.dim() - 1))
        self.alpha = nn.Parameter(ones)
        self.register_buffer("mask", torch.ones(layer.weight.shape, dtype=torch.bool))
        self.counted: dict[str, float] = {}

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Prune by magnitude, then fit alpha and the codes by turns, starting plane by plane on what is left over."""
        w = x.detach().float()
        keep = max(1, round((1 - self.sparsity) * w.numel()))
        mask = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
        mask[w.abs().flatten().topk(keep).indices] = True
        self.mask, self.alpha.data = mask.view(w.shape), self.alpha.data.to(w.device)
        count = self.mask.flatten(1).sum(1).clamp(min=1).view_as(self.alpha[0])
        rest = w * self.mask
        for alpha in self.alpha:
            alpha.copy_(rest.abs().flatten(1).sum(1).view_as(alpha) / count)
            rest -= alpha * torch.where(rest >= 0, 1.0, -1.0) * self.mask
        for _ in range(ROUNDS if self.planes > 1 else 0):
            b = self.signs(w).flatten(2).permute(1, 2, 0)  # [out, weights, planes]
            ridge = 1e-6 * torch.eye(self.planes, device=w.device)
            fit = torch.linalg.lstsq(b.mT @ b + ridge, b.mT @ (w * self.mask).flatten(1)[..., None])
            self.alpha.copy_(fit.solution[..., 0].T.reshape(self.alpha.shape))

    @torch.no_grad()
    def signs(self, x: Tensor) -> Tensor:
        """The planes [q, *weight] of the nearest values: -1 or +1, and 0 where pruned."""
        shape = (2**self.planes, self.planes, *[1] * x.dim())
        codes, plane = (torch.arange(n, device=x.device) for n in (2**self.planes, self.planes))
        table = 2.0 * (codes.unsqueeze(1) >> plane & 1) - 1
        levels = (table.view(shape) * self.alpha).sum(1)
        nearest = (x - levels).abs().argmin(0)
        return table[nearest].movedim(-1, 0) * self.mask

    def quantize(self, x: Tensor) -> Tensor:
        return (self.signs(x) * self.alpha).sum(0) + self.mask * (x - x.detach())

    def grid(self, x: Tensor | None = None) -> Planes:
        return planes(self.alpha, pruned=True)

    def codes(self, x: Tensor) -> Tensor:
        """Of the planes, which values alone would not tell where two sums of alphas are equal."""
        signs = self.signs(x.detach().float())
        return self._codes(signs > 0, signs[0] != 0)

    def _codes(self, bits: Tensor, kept: Tensor) -> Tensor:
        return Planes.join(bits).masked_fill(~kept, self.grid().hi)

    def slices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bits and care of all planes, bool [planes * slices, n_out]; places beyond the weight are nobody's care.

        Of s slices, slice i takes the weights i, i + s, i + 2s ... of the layer. Kept weights crowd in few channels;
        spread like this they need less than half the patches that runs of n_out neighbours would (ResNet-20).
        """
        signs = self.signs(x.detach().float()).flatten(1).cpu()
        signs = nn.functional.pad(signs, (0, -signs.shape[1] % self.spec.n_out))
        signs = signs.view(self.planes, self.spec.n_out, -1).mT.flatten(0, 1)
        return signs > 0, signs != 0

    def stored(self, x: Tensor) -> dict[str, Part]:
        """Seeds, patches and mask.

        Errors: RuntimeError where they stand for other codes.
        """
        encrypted = encrypt(*self.slices(x), self.spec)
        parts = encrypted.parts() | mask_parts(self.mask)
        if not self.restored(parts).equal(self.codes(x).cpu()):
            raise RuntimeError("decoding the encrypted weights gave other codes")
        share = {name: part.bits / x.numel() for name, part in parts.items()}
        patches = share.get("patches", 0.0) + share.get("patch_counts", 0.0)
        self.counted = {
            "seed_bits": share["seeds"],
            "patch_bits": patches,
            "mask_bits": share.get("mask", 0.0) + share.get("gaps", 0.0) + share.get("rice", 0.0),
            "compression_ratio": self.bits / sum(share.values()),
            "compression_ratio_without_mask": self.planes / (share["seeds"] + patches),
            "patches": int(encrypted.patches.sum()),
            "slices": len(encrypted.seeds),
        }
        return parts

    def restored(self, parts: dict[str, Part]) -> Tensor:
        decoded = decrypt(Encrypted.of(parts, self.spec.n_out), self.spec).view(self.planes, -1, self.spec.n_out)
        bits = decoded.mT.flatten(1)[:, : self.mask.numel()].view(self.planes, *self.mask.shape)
        return self._codes(bits, mask_of(parts, self.mask.shape))

    def coding(self) -> dict[str, str]:
        return {"kind": "xor", "bits": "seeds", "order": "gates"}

    def shared(self) -> dict[Hashable, Part]:
        """The wiring M [n_out, n_in]."""
        return {self.spec: Part(matrix_of(self.spec), 1)}

    def describe(self) -> dict[str, Any]:
        """Beside the usual: bits per weight of seeds, patches and mask, as `stored` last counted them, and two ratios.

        `bits` a weight, as before encryption, to the sum of these three, and the paper's, which counts the mask on
        neither side: a bit a plane to seeds and patches.
        """
        keys = ("n_in", "n_out", "matrix_seed", "rank", "duplicate_rows", "unused_inputs")
        wiring = {key: value for key, value in xor_spec.facts(self.spec).items() if key in keys}
        return super().describe() | wiring | {"planes": self.planes, "sparsity": self.sparsity} | self.counted
