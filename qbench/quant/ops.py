"""Straight-through primitives with explicit gradients.

No gradient here comes from autograd of clamp or hardtanh: their value at a bound is a convention that differs between
versions, and at two bits half of all codes lie on a bound. Every mask is written out.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

compiled: Any = None  # what calls formulas while kernels=compile is in use: qbench.kernels.use


def formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a forward or backward formula that torch.compile may take over (kernels=compile).

    Elementwise in its tensors, which have the shape of the first one or are single numbers, but for sums over all of
    them; the results likewise. It takes and gives float32 or bf16, and computes in float32. Nothing is differentiated.
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        return function(*args) if compiled is None else compiled(function, *args)

    return call


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value`; the gradient goes to `x` unchanged (arXiv 1308.3432). Shapes: equal."""
    return _StraightThrough.apply(x, value)  # type: ignore[no-any-return]


def round(x: Tensor) -> Tensor:
    """Round half to even; gradient 1."""
    return straight_through(x, x.round())


def floor(x: Tensor) -> Tensor:
    """Round towards minus infinity; gradient 1."""
    return straight_through(x, x.floor())


def sign_value(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1; no gradient. sign(0) is +1, unlike torch.sign."""
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)  # several times faster than torch.where of two numbers


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1; gradient 1 everywhere (BinaryConnect's identity)."""
    return straight_through(x, sign_value(x))


@formula
def _sign_clipped(x: Tensor, inclusive: bool) -> tuple[Tensor, Tensor]:
    """(sign, where the gradient passes)."""
    return sign_value(x), x.abs() <= 1 if inclusive else x.abs() < 1


class _SignClipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inclusive: bool) -> Tensor:
        y, inside = _sign_clipped(x, inclusive)
        ctx.save_for_backward(inside)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None


def sign_clipped(x: Tensor, inclusive: bool = False) -> Tensor:
    """sign(x) with gradient 1[|x| < 1], or 1[|x| <= 1] when `inclusive` (arXiv 1602.02830 Eq. 4)."""
    return _SignClipped.apply(x, inclusive)  # type: ignore[no-any-return]


class _SignWithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return sign_value(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None


def sign_with_slope(x: Tensor, slope: Tensor) -> Tensor:
    """sign(x), +1 at 0, with gradient `slope`, a tensor of x's shape that gets no gradient itself."""
    return _SignWithSlope.apply(x, slope)  # type: ignore[no-any-return]


def polynomial_slope(x: Tensor) -> Tensor:
    """max(0, 2 - 2 |x|): the derivative of the quadratic pieces 2x + x^2 and 2x - x^2 (arXiv 1808.00278 Eq. 6)."""
    return (2 - 2 * x.abs()).clamp_min(0)


def tanh_slope(x: Tensor, t: Tensor) -> Tensor:
    """k t (1 - tanh^2(t x)), the derivative of k tanh(t x), with k = max(1/t, 1) (arXiv 1909.10788 Eq. 8)."""
    return (1 / t).clamp_min(1) * t * (1 - (t * x).tanh().square())


def fourier_slope(x: Tensor, n: Tensor, omega: float) -> Tensor:
    """(4 omega / pi) * sum_{i=0..n} cos((2i + 1) omega x): a square wave's series, differentiated term by term.

    The sum is sin(2 (n + 1) u) / (2 sin u) with u = omega x, and (n + 1) cos u where sin u vanishes. Where |x| >= pi /
    omega, half a period, the wave is no longer the sign, and the slope is 0. Reference: arXiv 2103.00841 Eq. 10
    """
    u = omega * x
    below = u.sin()
    flat = below.abs() < 1e-4
    total = torch.where(flat, (n + 1) * u.cos(), (2 * (n + 1) * u).sin() / (2 * below.masked_fill(flat, 1.0)))
    return 4 * omega / math.pi * total * (u.abs() < math.pi)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: Any, hi: Any) -> Tensor:
        ctx.save_for_backward((x >= lo) & (x <= hi))
        return x.clamp(lo, hi)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


def clip(x: Tensor, lo: float | Tensor, hi: float | Tensor) -> Tensor:
    """clip(x, lo, hi); gradient 1 on lo <= x <= hi (both bounds inside), else 0; none to the bounds."""
    return _Clip.apply(x, lo, hi)  # type: ignore[no-any-return]


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.scale, None


def scale_grad(x: Tensor, scale: float) -> Tensor:
    """Identity; the gradient is multiplied by `scale`."""
    return _ScaleGrad.apply(x, scale)  # type: ignore[no-any-return]


class _OnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.function(grads[0]), None


def on_backward(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Identity; `function` is applied to the gradient (error quantization)."""
    return _OnBackward.apply(x, function)  # type: ignore[no-any-return]


def ap2(x: Tensor) -> Tensor:
    """The nearest power of two on a logarithmic scale, sign(x) 2^round(log2 |x|), 0 at 0: what a binary shift is by."""
    return x.sign() * x.abs().log2().round().exp2()


def stochastic_round(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """floor(x + u), u ~ U[0, 1): unbiased, E = x; no gradient. The generator is explicit and checkpointed."""
    low = x.floor()
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return low + (u >= 1 - (x - low))  # x + u itself would be rounded: a whole x of 16 bits would sometimes move up
