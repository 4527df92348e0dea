"""APoT: levels that are sums of powers of two, with learned clips and normalized weights (arXiv 1909.13144)."""

from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.methods.shared.ladder import Progressive
from qbench.methods.shared.levels import places
from qbench.methods.shared.sample import Sample
from qbench.quant import ranges
from qbench.quant.grid import Affine, Book, multiples
from qbench.quant.quantizer import Rectifier, check_choice
from qbench.quant.uniform import UniformGrid

SMALLEST = 1e-3  # the clip is read as at least this
GRIDS = ("apot", "pot", "uniform")


@cache
def levels(bits: int, grid: str = "apot") -> tuple[float, ...]:
    """The 2^bits levels of 0..1, rising.

    apot: all sums of n terms of two bits each; term j is 0, 2^-j, 2^-(j + n) or 2^-(j + 2n), divided by the largest
    sum. An odd number of bits has a term more, of one bit, before the terms' last powers: with 3 bits 0, 1/2, 1/4 or
    1/16, plus 0 or 1/8. pot: 0 and the powers of two from 1 down. uniform: equal steps.
    """
    if grid == "uniform":
        return tuple(i / (2**bits - 1) for i in range(2**bits))
    if grid == "pot":
        return (0.0, *(2.0**-i for i in reversed(range(2**bits - 1))))
    n, odd = divmod(bits, 2)
    terms = [[0.0, *(2.0 ** -(j + i * n + (odd and i == 2)) for i in range(3))] for j in range(n)]
    sums = sorted(map(sum, product(*terms, *[[0.0, 2.0 ** -(2 * n)]] * odd)))
    return tuple(s / sums[-1] for s in sums)


@cache
def _tensors(bits: int, grid: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(levels, what lies halfway between them), kept on the device: a recorded step may copy nothing there."""
    table = torch.tensor(levels(bits, grid), device=device)
    return table, (table[1:] + table[:-1]) / 2


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        scale: Tensor,
        table: Tensor,
        ends: Tensor,
        signed: bool,
        rest: tuple[bool, bool],
    ) -> Tensor:
        a = alpha.clamp_min(SMALLEST)
        z = x / a
        q = table[places(z.abs() if signed else z, ends)]
        q = q * z.sign() if signed else q
        ctx.save_for_backward(z, q, scale)
        ctx.signed, (ctx.masked, ctx.residual) = signed, rest
        return q * (a * scale)  # the product that the grid has

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        z, q, scale = ctx.saved_tensors
        g = grads[0] * scale
        outside = (z.abs() if ctx.signed else z) > 1
        within = q - z if ctx.residual else torch.zeros_like(z)
        dalpha = (g * torch.where(outside, q, within)).sum()  # q is sign(x) outside
        return g.masked_fill(outside, 0) if ctx.masked else g, dalpha, None, None, None, None, None


class _APoT(Progressive):
    """What weights and inputs share: x_hat = alpha q(x / alpha), q the nearest level, of two the smaller."""

    signed: bool
    kind: str
    masked: bool
    residual: bool
    alpha: nn.Parameter
    scale: Tensor

    def start(self, alpha: float, grid: str, gradient: str) -> None:
        self.kind = check_choice("grid", grid, GRIDS)
        self.residual = check_choice("alpha_gradient", gradient, ("apot", "pact")) == "apot"
        if not (isinstance(alpha, int | float) and alpha > 0):
            raise ValueError(f"alpha must be a number above 0, got {alpha!r}")
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.register_buffer("scale", torch.ones(()), persistent=False)

    @property
    def table(self) -> tuple[float, ...]:
        """The levels from 0 to 1; where there is a sign, it takes one of the bits."""
        return levels(int(self.bits - self.signed), self.kind)

    def level(self, x: Tensor, alpha: Tensor) -> Tensor:
        found = _tensors(int(self.bits - self.signed), self.kind, x.device)
        return _Levels.apply(x, alpha, self.scale, *found, self.signed, (self.masked, self.residual))  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Book:
        scale = self.alpha.detach().clamp_min(SMALLEST) * self.scale
        mirrored = [-v for v in reversed(self.table[1:])] if self.signed else []
        return multiples(scale, [*mirrored, *self.table])


class APoTWeight(_APoT):
    """w_hat = scale alpha q(u / alpha), u = (w - mean(w)) / std(w); 2^bits - 1 levels, as 0 has no sign.

    One learned alpha per tensor, read as at least 1e-3. Any shape of more than one weight.
    Gradient: to u, g, also beyond alpha; to alpha sign(u) where |u| > alpha, else q - u / alpha, summed (`apot`: the
    clip is a function of alpha that is differentiated after the projection), or 0 there (`pact`). Mean and standard
    deviation are constants in the gradient, as in the authors' code, unless `through`.

    Departure: from a float net `scale` is the float weight's standard deviation, a constant, so that the net begins as
    the float net does; batch-norm cancels it. With init='scratch' it is 1.

    Args:
        bits: 2..6, of which one is the sign
        grid: 'apot' | 'pot' | 'uniform'
        alpha: where the clip starts, above 0, in standard deviations
        alpha_gradient: 'apot' | 'pact'
        normalize: False leaves w as it is (u = w, and alpha starts at as many of its standard deviations)
        through: differentiate mean and standard deviation
        init: see above

    Raises:
        ValueError: an argument out of its range

    Reference: arXiv 1909.13144; starts and gradients are those of the authors' code
    """

    signed = True
    masked = False

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        grid: str = "apot",
        alpha: float = 3.0,
        alpha_gradient: str = "apot",
        normalize: bool = True,
        through: bool = False,
        init: str = "float",
    ) -> None:
        super().__init__()
        self.ask(bits, 2, 6)
        self.start(alpha, grid, alpha_gradient)
        self.normalize, self.through, self.fitted = normalize, through, normalize and init != "scratch"
        self.idempotent = not normalize
        self.register_buffer("scale", torch.ones(()))  # part of the state, unlike the inputs' 1

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        std = x.std().clamp_min(1e-8)
        if self.fitted:
            self.scale.copy_(std)
        if not self.normalize:
            self.alpha.mul_(std)

    def quantize(self, x: Tensor) -> Tensor:
        if not self.normalize:
            return self.level(x, self.alpha)
        w = x if self.through else x.detach()
        return self.level((x - w.mean()) / w.std().clamp_min(1e-8), self.alpha)


class APoTInput(_APoT, Rectifier):
    """x_hat = alpha q(x / alpha), x above alpha clipped; 2^bits levels from 0 to alpha. Any shape.

    Where calibration meets values below 0, which follow no ReLU, levels and clip are those of weights.
    Gradient: to x, 1 up to alpha, else 0; to alpha as in `APoTWeight`.

    Departure: unless given, alpha starts where the squared error over the calibration images is least; the authors'
    code has 8 in nets of their own.

    Args:
        bits: 2..6
        grid, alpha_gradient: as in `APoTWeight`
        alpha: where the clip starts, above 0; None: calibrated

    Raises:
        ValueError: an argument out of its range

    Reference: arXiv 1909.13144
    """

    masked = True

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        grid: str = "apot",
        alpha: float | None = None,
        alpha_gradient: str = "apot",
    ) -> None:
        super().__init__(layer, site)
        self.ask(bits, 2, 6)
        self.start(8.0 if alpha is None else alpha, grid, alpha_gradient)
        self.calibrated = alpha is None
        self._sample = Sample()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        super().calibrate(x)
        self._sample.add(x)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        x = self._sample.take()
        if x is not None and self.calibrated and (largest := x.abs().max()) > 0:
            tries = largest * torch.linspace(1 / 64, 1, 64, device=x.device)
            self.alpha.copy_(tries[torch.stack([(self.level(x, a) - x).square().sum() for a in tries]).argmin()])

    def quantize(self, x: Tensor) -> Tensor:
        return self.level(x, self.alpha)


class Largest(UniformGrid):
    """Weights of first and last layer: equal steps on both sides of 0, up to the weight's largest magnitude.

    It is that of the weight as it is now.

    Departure: the authors' code takes the largest value; where the least is larger in magnitude, that grid has more
    codes than its bits. Gradient 1. Any shape.
    """

    def __init__(self, layer: nn.Module, site: str, *, bits: int) -> None:
        super().__init__(layer, site, bits=bits, symmetric=True, restricted=True)

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Affine:
        lo, hi = ranges.minmax(torch.tensor([-1.0, 1.0]) if x is None else x.detach().flatten())
        return self._between(*ranges.grid(lo, hi, self.bounds, symmetric=True), dynamic=x is None)
