"""HWGQ: half-wave Gaussian quantization of activations, behind binary weights (arXiv 1702.00953)."""

import math
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.errors import UserError
from qbench.methods.shared.levels import places
from qbench.quant.grid import Affine, Book, affine, book
from qbench.quant.quantizer import Rectifier, check_bits, check_choice

# Steps of least squared error for the positive half of N(0, 1), by the number of positive values. For 3 the authors'
# own, of three digits; the others are computed, and a test computes all of them again.
STEPS = {1: 0.7979, 3: 0.538, 7: 0.3217, 15: 0.1842}


@cache
def lloyd(n: int) -> tuple[float, ...]:
    """The n values that represent the positive half of N(0, 1) with the least squared error, rising.

    Each is the mean of what lies nearer to it than to its neighbours, to which Lloyd's iteration converges.
    """

    def below(x: float) -> float:
        return math.erf(x / math.sqrt(2))

    def density(x: float) -> float:
        return math.sqrt(2 / math.pi) * math.exp(-x * x / 2)

    values = [(2 * i + 1) * 1.2 / n for i in range(n)]
    for _ in range(3000):
        ends = [0.0, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
        values = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in pairwise(ends)]
    return tuple(values)


class _HalfWave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, ends: Tensor, signed: bool, backward: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.signed, ctx.kind = signed, backward
        ctx.top = table[-1]
        size = x.abs() if signed else x
        y = table[places(size, ends)]
        return y * x.sign() if signed else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        size = x.abs() if ctx.signed else x
        slope = (size > 0).to(x.dtype)
        if ctx.kind == "clipped":
            slope = slope * (size <= ctx.top)
        if ctx.kind == "log":
            slope = slope / (size - (ctx.top - 1)).clamp_min(1)
        return grads[0] * slope, None, None, None, None


class HWGQ(Rectifier):
    """Constants in place of a ReLU: the values that fit the positive half of a Gaussian of variance 1 best.

    x_hat = 0 for x <= 0, q_i for t_i < x <= t_{i+1}; t_1 = 0, so that the least value above 0 becomes q_1; the others
    lie halfway between the q. `uniform`: q_i = i step, with 0.538 at 2 bits; `lloyd`: the means of their intervals.
    Any shape.
    Gradient, with q_max the largest value:
      clipped: 1 for 0 < x <= q_max, else 0
      vanilla: 1 for x > 0, else 0: that of ReLU
      log:     as vanilla up to q_max, and 1 / (x - tau) above, tau = q_max - 1, which joins the two

    It stands in place of a ReLU, as in the paper, or in the slot `input` of a layer. There it may meet values of both
    signs, which the paper has not; where calibration does, sign(x) times the value of |x| for one bit less.

    Args:
        bits: 1..4
        grid: 'uniform' | 'lloyd'
        positive: how many values above 0, of those that `bits` has codes for; None: all. uniform: 1, 3, 7, 15
        backward: 'clipped' | 'vanilla' | 'log'

    Raises:
        ValueError: an argument out of its range
        UserError: one bit, and an input of both signs

    Reference: arXiv 1702.00953 (the authors' code and an account of it; its text was not seen)
    """

    table: Tensor
    ends: Tensor

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        grid: str = "uniform",
        positive: int | None = None,
        backward: str = "clipped",
    ) -> None:
        super().__init__(layer, site)
        self.bits = check_bits(bits, 1, 4)
        self.kind = check_choice("grid", grid, ("uniform", "lloyd"))
        self.gradient = check_choice("backward", backward, ("clipped", "vanilla", "log"))
        self.positive = None if positive is None else check_bits(positive, 1, 2**self.bits - 1, "positive")
        if grid == "uniform" and positive is not None and positive not in STEPS:
            raise ValueError(f"a uniform grid has 1, 3, 7 or 15 values above 0, got positive={positive}")
        self._fill()

    def _fill(self) -> None:
        n = 2 ** (int(self.bits) - self.signed) - 1
        n = n if self.positive is None else min(self.positive, n)
        if self.kind == "lloyd":
            table = torch.tensor([0.0, *lloyd(n)])
        else:
            table = torch.arange(n + 1.0) * torch.tensor(STEPS[n])  # the products that the grid has
        device = self.table.device if hasattr(self, "table") else None
        self.register_buffer("table", table.to(device), persistent=False)
        self.register_buffer("ends", torch.cat([table[:1], (table[1:-1] + table[2:]) / 2]).to(device), persistent=False)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        before = self.signed
        super().calibrate(x)
        if self.signed == before:
            return
        if self.bits == 1:
            raise UserError(
                "a_bits=1 leaves HWGQ no codes for inputs of both signs, which this net has: a_bits=2 or more"
            )
        self._fill()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self._fill()

    def quantize(self, x: Tensor) -> Tensor:
        return _HalfWave.apply(x, self.table, self.ends, self.signed, self.gradient)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Affine | Book:
        n = len(self.table) - 1
        if self.kind == "uniform":
            return affine(STEPS[n], -n if self.signed else 0, n)
        values = torch.cat([-self.table[1:].flip(0), self.table]) if self.signed else self.table
        return book(values, fixed=range(len(values)))  # constants of the method


def plain_norm(module: nn.BatchNorm2d | nn.BatchNorm1d, site: str) -> nn.Module:
    """In place of a batch-norm: one without learned scale and shift, so that what leaves it has variance 1.

    Running averages keep 0.95 of themselves, as in the authors' code.
    """
    norm = type(module)(module.num_features, eps=module.eps, momentum=0.05, affine=False)
    norm.load_state_dict({k: v for k, v in module.state_dict().items() if k not in ("weight", "bias")})
    return norm
