"""What two papers or more on two-valued nets use: scaled signs of weights, signs of inputs, gradients through sign."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant import ops, quantizer
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Codes, Kernel, Quantizer, check_bits, check_choice

GRADIENTS = ("paper", "exact", "constant_alpha", "unscaled", "released")
SLOPES = ("identity", "clipped", "polynomial", "tanh", "fourier")


class Slope(nn.Module):
    """What stands for the derivative of sign in the backward pass, by name; the forward pass is sign, +1 at 0.

      identity:   1                                                              BinaryConnect
      clipped:    1[|x| <= clip]                                                 BNN
      polynomial: max(0, 2 - 2 |x|)                                              Bi-Real Net, arXiv 1808.00278
      tanh:       k t (1 - tanh^2(t x)), k = max(1/t, 1)                         IR-Net, arXiv 1909.10788
      fourier:    (4 omega / pi) sum_{i=0..n} cos((2i + 1) omega x), |x| < pi / omega    FDA-BNN, arXiv 2103.00841

    t and n (`terms`) are 0-dim buffers, 1 and 9 unless `AnnealSlope` moves them.

    Errors: ValueError on an unknown kind, clip or omega not above 0.
    """

    training_only = True
    t: Tensor
    terms: Tensor

    def __init__(self, kind: str, *, clip: float = 1.0, omega: float = 0.1) -> None:
        super().__init__()
        # the options' names, as `gradient` is another option of some methods
        self.kind = check_choice("act_gradient or weight_gradient", kind, SLOPES)
        if not clip > 0 or not omega > 0:
            raise ValueError(f"clip and omega must be above 0, got clip={clip!r}, omega={omega!r}")
        self.clip, self.omega = clip, omega
        if kind == "tanh":
            self.register_buffer("t", torch.ones(()))
        if kind == "fourier":
            self.register_buffer("terms", torch.tensor(9))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The slope at x, of its shape."""
        if self.kind == "clipped":
            return (x.abs() <= self.clip).to(x.dtype)
        if self.kind == "polynomial":
            return ops.polynomial_slope(x)
        if self.kind == "tanh":
            return ops.tanh_slope(x, self.t)
        if self.kind == "fourier":
            return ops.fourier_slope(x, self.terms, self.omega)
        return torch.ones_like(x)

    def sign(self, x: Tensor) -> Tensor:
        """sign(x) with this gradient."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return ops.sign_value(x)
        if quantizer.fast is not None and quantizer.fast.takes(x):
            return quantizer.fast.quantize(x, self.kernel())  # type: ignore[no-any-return]
        return ops.sign_with_slope(x, self(x))

    def pass_through(self, x: Tensor, value: Tensor, unit: float = 1.0) -> Tensor:
        """`value`, whatever sign it was made of, with the gradient of this slope at x / unit."""
        return ops.straight_through(x if self.kind == "identity" else x * self(x / unit), value)

    def alike(self) -> Any:
        """What two slopes share if they are the same; t and terms are those of the whole net."""
        return self.kind, self.clip, self.omega

    def kernel(self, *shift: Tensor) -> Kernel:
        """sign(x), or sign(x - shift), with this gradient, as a compiled kernel knows it."""
        value = {"identity": math.inf, "clipped": self.clip, "polynomial": 1.0}.get(self.kind)
        if self.kind == "tanh":
            return Kernel("tanh", self.t.item(), shift)
        if value is None:
            return Kernel("fourier", self.omega, shift, steps=int(self.terms.item()))
        return Kernel("polynomial" if self.kind == "polynomial" else "sign", value, shift, closed=True)

    def extra_repr(self) -> str:
        return self.kind


class AnnealSlope(Hook):
    """Sharpen the tanh and fourier slopes of all sign functions; a pure function of the share s of the training done.

    t = t_0 (t_1 / t_0)^s; n = n_0 + s (n_1 - n_0), rounded. Other slopes have nothing to anneal. IR-Net's code moves t
    once an epoch; here it moves every step, through the same values.

    Errors: ValueError on t not above 0 or n below 0.
    Reference: arXiv 1909.10788, Eq. 9; 2103.00841, Sec. 3.2 (setting 3)
    """

    def __init__(self, t: Sequence[float] = (1e-3, 10.0), terms: Sequence[int] = (9, 18)) -> None:
        super().__init__()
        if len(t) != 2 or not all(v > 0 for v in t):
            raise ValueError(f"t must be two numbers above 0, from and to, got {list(t)}")
        if len(terms) != 2 or not all(v >= 0 and v == int(v) for v in terms):
            raise ValueError(f"terms must be two whole numbers >= 0, from and to, got {list(terms)}")
        self.t, self.terms = tuple(t), tuple(terms)

    def before_train(self, state: State) -> None:
        self.before_step(state)

    def before_step(self, state: State) -> None:
        share = state.training_share
        for module in state.model.modules():
            if isinstance(module, Slope) and module.kind == "tanh":
                module.t.fill_(self.t[0] * (self.t[1] / self.t[0]) ** share)
            if isinstance(module, Slope) and module.kind == "fourier":
                module.terms.fill_(self.terms[0] + round(share * (self.terms[1] - self.terms[0])))


def mean_magnitude(w: Tensor) -> Tensor:
    """mean|w| of each output channel, [out, 1, ...]; in float64, so that the mean of equal values is that value."""
    return w.abs().mean(tuple(range(1, w.dim())), keepdim=True, dtype=torch.float64).to(w.dtype)


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, gradient: str, slope: Tensor) -> Tensor:
        alpha = mean_magnitude(w)
        ctx.save_for_backward(w, alpha, slope)
        ctx.gradient = gradient
        return alpha * ops.sign_value(w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        w, alpha, slope = ctx.saved_tensors
        g, n = grads[0], w[0].numel()
        if ctx.gradient == "unscaled":
            return g * slope, None, None
        if ctx.gradient == "released":
            return g * (1 / n + alpha * slope) * (n * (1 - 1 / w.shape[1])), None, None
        through_sign = g * alpha * slope
        if ctx.gradient == "paper":
            return g / n + through_sign, None, None
        if ctx.gradient == "exact":
            s = ops.sign_value(w)
            return s * (g * s).mean(tuple(range(1, w.dim())), keepdim=True) + through_sign, None, None
        return through_sign, None, None


class BinaryWeight(Quantizer):
    """w_hat = alpha * sign(w) with alpha = mean|w| of each output channel, the least-squares scale; sign(0) = +1.

    The gradient, with g = dL/dw_hat, n weights per output channel and c input channels, is one of
      paper:          g_i * (1/n + alpha * 1[|w_i| <= 1])
      exact:          sign(w_i)/n * sum_j g_j sign(w_j) + alpha * g_i * 1[|w_i| <= 1]    alpha depends on all weights
      constant_alpha: alpha * g_i * 1[|w_i| <= 1]
      unscaled:       g_i * 1[|w_i| <= 1]                            the code of Bi-Real Net and ReActNet
      released:       n * (1 - 1/c) * g_i * (1/n + alpha * 1[|w_i| < 1])    the authors' Torch code, for SGD
    For Adam that code multiplies by 1e9 beside, to which Adam is blind: it only drowns the weight decay.

    `sign_gradient` puts one of the slopes of `Slope` in place of 1[|w| <= 1]. Weight: [out, in, ...].

    Errors: ValueError on bits other than 1, an unknown gradient, `released` with one input channel.
    Reference: arXiv 1603.05279, Sec. 3.1, Eq. 6 and Algorithm 1
    """

    granularity = "per_channel"

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 1,
        gradient: str = "paper",
        sign_gradient: str | None = None,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.gradient = check_choice("gradient", gradient, GRADIENTS)
        self.slope = None if sign_gradient is None else Slope(sign_gradient)
        if gradient == "released" and layer.weight.shape[1] == 1:
            raise ValueError("gradient=released is 0 for a layer with one input channel, as its factor is 1 - 1/c")

    def quantize(self, x: Tensor) -> Tensor:
        if self.slope is not None:
            slope = self.slope(x)
        else:
            slope = x.abs() < 1 if self.gradient == "released" else x.abs() <= 1
        return _ScaledSign.apply(x, self.gradient, slope)  # type: ignore[no-any-return, no-untyped-call]

    def alike(self) -> Any:
        return self.gradient, None if self.slope is None else self.slope.alike()

    def codes(self, x: Tensor) -> Codes:
        """One plane of -1 and +1, with alpha as its coefficient."""
        w = x.detach().float()
        return Codes("planes", ops.sign_value(w).to(torch.int8)[None], {"coefficients": mean_magnitude(w)[None]})

    def stored_bits(self, weight: Tensor) -> tuple[float, float]:
        return float(weight.numel()), 32.0 * weight.shape[0]

    def describe(self) -> dict[str, Any]:
        slope = {} if self.slope is None else {"sign_gradient": self.slope.kind}
        return super().describe() | {"gradient": self.gradient} | slope


class Sign(Quantizer):
    """x_hat = sign(x), +1 at 0; gradient 1[|x| < 1], or 1[|x| <= 1] where `inclusive`.

    Args:
        gradient: one of the slopes of `Slope` in place of that one, with its `clip` and `omega`
        hardtanh: clip to [-1, 1] while disabled, so that a net can be trained in float before its inputs are binary

    Errors: ValueError on bits other than 1.
    Reference: arXiv 1603.05279, Sec. 3.2 (open interval, as in the authors' code); 1602.02830, Eq. 4 (closed)
    """

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 1,
        inclusive: bool = False,
        gradient: str | None = None,
        clip: float = 1.0,
        omega: float = 0.1,
        hardtanh: bool = False,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.inclusive, self.hardtanh = inclusive, hardtanh
        self.slope = None if gradient is None else Slope(gradient, clip=clip, omega=omega)
        self.casts = self.slope is None

    def bypass(self, x: Tensor) -> Tensor:
        return ops.clip(x, -1, 1) if self.hardtanh else x

    def quantize(self, x: Tensor) -> Tensor:
        return ops.sign_clipped(x, self.inclusive) if self.slope is None else self.slope.sign(x)

    def kernel(self, shape: torch.Size) -> Kernel | None:
        return Kernel("sign", closed=self.inclusive) if self.slope is None else self.slope.kernel()

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({} if self.slope is None else {"gradient": self.slope.kind})


class HardTanh(nn.Module):
    """clip(x, -1, 1) in place of a ReLU; gradient 1 on the closed interval, else 0."""

    def __init__(self, module: nn.Module, site: str, *, bits: float = 1) -> None:  # bits: 32 leaves the ReLU (`Rule`)
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return ops.clip(x, -1, 1)

    def kernel(self, shape: torch.Size) -> Kernel:
        return Kernel("bounded", 1.0)
