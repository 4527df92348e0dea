"""LQ-Nets: levels that are sums of a learned basis, found by alternating least squares (arXiv 1807.10029)."""

from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.methods.shared.levels import places
from qbench.methods.shared.sample import Sample
from qbench.quant import ops
from qbench.quant.grid import Book, Planes, book, planes
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Quantizer, Rectifier, check_bits

QUARTILE = 0.6745  # of N(0, 1): where the authors' basis starts, in standard deviations
RIDGE = 1e-4  # the authors' too, of the weights: a bit that no value uses keeps its part of the basis
START = 20  # turns of QEM on the tensors of a float net


@cache
def _codes(bits: int, signed: bool, device: torch.device) -> Tensor:
    """[2^bits, bits]: the bits of each code, 0 and 1, or -1 and +1."""
    table = torch.arange(2**bits, device=device)[:, None] >> torch.arange(bits, device=device) & 1
    return (2 * table - 1 if signed else table).float()


def levels(basis: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(the sums of a basis [rows, bits], rising, [rows, 2^bits]; the code of each)."""
    bits = _codes(basis.shape[1], signed, basis.device).T
    sums: Tensor = reduce(
        torch.add, (v[:, None] * b for v, b in zip(basis.T, bits, strict=True))
    )  # as a grid adds them
    return sums.sort(1)  # type: ignore[return-value]


def halfway(rising: Tensor) -> Tensor:
    return (rising[:, 1:] + rising[:, :-1]) / 2


def refit(x: Tensor, basis: Tensor, signed: bool, turns: int = 1) -> Tensor:
    """The basis after some turns of QEM: the codes of x [rows, n] on the levels of the basis [rows, bits], then the
    least squares basis for these codes, (B B^T)^-1 B x.

    Reference: arXiv 1807.10029, the algorithm called QEM
    """
    rows, bits = basis.shape
    for _ in range(turns):
        rising, order = levels(basis, signed)
        above = [x > end for end in halfway(rising).T[..., None]]
        whole = torch.full((1, rows), float(x.shape[1]), device=x.device)
        none = torch.zeros((1, rows), device=x.device)
        counts = torch.cat([whole, torch.stack([a.sum(1) for a in above]).float(), none])
        sums = torch.cat([x.sum(1)[None], torch.stack([(x * a).sum(1) for a in above]), none])
        of_level = _codes(bits, signed, x.device)[order]  # [rows, levels, bits]
        counted = of_level * (counts[:-1] - counts[1:]).T[..., None]
        a = of_level.transpose(1, 2) @ counted + RIDGE * torch.eye(bits, device=x.device)
        y = (of_level * (sums[:-1] - sums[1:]).T[..., None]).sum(1) + RIDGE * basis
        basis = _solved(a.double(), y.double()).to(basis.dtype)
    return basis


def _solved(a: Tensor, y: Tensor) -> Tensor:
    """a^-1 y of positive definite a, [rows, n, n] and [rows, n]; torch's solvers cannot be part of a CUDA graph."""
    both = torch.cat([a, y[..., None]], 2)
    for k in range(a.shape[1]):
        pivot = both[:, k : k + 1] / both[:, k : k + 1, k : k + 1]
        both = both - both[:, :, k : k + 1] * pivot
        both[:, k : k + 1] = pivot
    return both[..., -1]


class LQWeight(Quantizer):
    """w_hat = the nearest of the 2^bits sums +-v_1 .. +-v_bits; of each output channel its own basis v, no constant.

    Gradient 1. v is not trained by gradients: `LearnBases` moves it with each step of the training, v <- decay v +
    (1 - decay) v', v' from `refit` on the weight. Of two equally near levels the lower. Weight: [out, ...].

    v starts at 2^j 0.6745 std / 2^(bits - 1), j = 0..bits - 1, as in the authors' code, with the std of the channel's
    weights in place of that of their initial distribution; from a float net 20 turns of QEM follow.

    Args:
        bits: 1..4
        decay: of the average, at least 0 and below 1
        turns: of QEM at each step
        init: 'scratch', or anything else for a start from a float net

    Raises:
        ValueError: an argument out of its range

    Reference: arXiv 1807.10029; constants of the authors' code
    """

    granularity = "per_channel"
    basis: Tensor

    def __init__(
        self, layer: QuantLayer, site: str, *, bits: int, decay: float = 0.9, turns: int = 1, init: str = "float"
    ) -> None:
        super().__init__()
        self.bits = width = check_bits(bits, 1, 4)
        self.decay, self.turns = check_average(decay, turns)
        self.init = init
        self.shape = (width, len(layer.weight), *[1] * (layer.weight.dim() - 1))
        self.register_buffer("basis", torch.ones(len(layer.weight), width))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        w = x.float().flatten(1)
        std = w.square().mean(1, keepdim=True).sqrt()
        self.basis.copy_(std * QUARTILE * 2.0 ** torch.arange(1 - int(self.bits), 1, device=x.device))
        if self.init != "scratch":
            self.basis.copy_(refit(w, self.basis, True, START))

    @torch.no_grad()
    def learn(self, w: Tensor) -> None:
        """Move the basis by one step."""
        self.basis.lerp_(refit(w.detach().float().flatten(1), self.basis, True, self.turns), 1 - self.decay)

    def quantize(self, x: Tensor) -> Tensor:
        rising, w = levels(self.basis, True)[0], x.detach().flatten(1).contiguous()
        hat = rising.gather(1, torch.searchsorted(halfway(rising), w))
        return ops.straight_through(x, hat.view(x.shape))

    def grid(self, x: Tensor | None = None) -> Planes:
        return planes(self.basis.T.reshape(self.shape))


class _UpTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rising: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward((x >= rising[0]) & (x <= rising[-1]))
        return rising[places(x, ends)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


class LQInput(Rectifier):
    """x_hat = the nearest of the 2^bits sums of some of v_1 .. v_bits, which include 0; one basis v per tensor.

    Where calibration meets values below 0, which follow no ReLU, the sums are those of weights, of both signs.
    Gradient: 1 up to the largest level (from the least one on, where there are both signs), else 0. v moves with each
    batch of the training as that of weights does: the batch is quantized first, with v as it was.

    v starts at 2^j 2 0.6745 sigma / (2^bits - 1), sigma = 1 as in the authors' code, or from a float net that of the
    Gaussian whose positive half has the calibration images' mean square; there 20 turns of QEM follow.

    Args: as `LQWeight`
    Raises: as `LQWeight`
    Reference: arXiv 1807.10029; constants of the authors' code
    """

    watches = True
    basis: Tensor

    def __init__(
        self, layer: nn.Module, site: str, *, bits: int, decay: float = 0.9, turns: int = 1, init: str = "float"
    ) -> None:
        super().__init__(layer, site)
        self.bits = width = check_bits(bits, 1, 4)
        self.decay, self.turns = check_average(decay, turns)
        self.init = init
        self.register_buffer("basis", 2 * QUARTILE / (2**width - 1) * 2.0 ** torch.arange(width)[None])
        self._sample = Sample()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        super().calibrate(x)
        self._sample.add(x)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        x = self._sample.take()
        if x is None or self.init == "scratch" or not (size := x.square().mean().sqrt()) > 0:
            return
        self.basis.mul_(size if self.signed else size * 2**0.5)
        self.basis.copy_(refit(x[None], self.basis, self.signed, START))

    def forward(self, x: Tensor) -> Tensor:
        hat = super().forward(x)
        if self.training and self.enabled and torch.is_grad_enabled():
            self._learn(x)
        return hat

    @torch.no_grad()
    def _learn(self, x: Tensor) -> None:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)  # else it would be copied
        row = (x.permute(0, 2, 3, 1) if last else x).float().reshape(1, -1)
        share = 1 - self.decay ** (1 / self.pieces[0])  # a step weighs the same, of however many micro-batches
        self.basis.lerp_(refit(row, self.basis, self.signed, self.turns), share)

    def quantize(self, x: Tensor) -> Tensor:
        rising = levels(self.basis, self.signed)[0]
        return _UpTo.apply(x, rising[0], halfway(rising)[0])  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Book:
        return book(levels(self.basis, self.signed)[0][0])


class LearnBases(Hook):
    """Move the bases of all weights before each step of the training, by one step of QEM on the weights as they are."""

    def before_step(self, state: State) -> None:
        for _, layer in quant_layers(state.model):
            if isinstance(layer.weight_quantizer, LQWeight) and layer.weight_quantizer.enabled:
                layer.weight_quantizer.learn(layer.source())


def check_average(decay: float, turns: int) -> tuple[float, int]:
    """Both as they are, or ValueError."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
    return float(decay), check_bits(turns, 1, 100, "turns")
