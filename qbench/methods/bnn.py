"""Binarized neural networks: binary weights and activations in every layer. Reference: arXiv 1602.02830"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.methods.shared.binary import Sign
from qbench.quant import ops
from qbench.quant.quantizer import Kernel


class BinaryActivation(Sign):
    """x_hat = sign(x) in place of a ReLU, +1 at 0; stochastic: +1 with probability clip((x + 1) / 2, 0, 1), else -1.

    The gradient is that of hardtanh, 1[|x| <= 1] (Eq. 4), in both cases; 1 everywhere without `clip_gradients`, the
    plain straight-through estimator of Alizadeh et al.; or one of the slopes of `Slope`, by `gradient`. Stochastic
    signs are for the training alone (Sec. 1.1), as in the authors' Torch code; in evaluation the sign is deterministic.
    Any shape.

    Errors: ValueError on bits other than 1.
    Reference: arXiv 1602.02830, Eq. 1, 2 and 4
    """

    told = (*Sign.told, "stochastic")

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: float = 1,
        stochastic: bool = False,
        clip_gradients: bool = True,
        gradient: str | None = None,
    ) -> None:
        super().__init__(layer, site, bits=bits, gradient=gradient or ("clipped" if clip_gradients else "identity"))  # type: ignore[arg-type]
        self.stochastic = stochastic

    def quantize(self, x: Tensor) -> Tensor:
        hat = super().quantize(x)
        if not (self.stochastic and self.training):
            return hat
        u = torch.rand(x.shape, generator=self.generator, device=x.device)
        drawn = torch.where(u < (x + 1) / 2, 1.0, -1.0)  # u in [0, 1) does the clipping
        return ops.straight_through(hat, drawn)

    def kernel(self, shape: torch.Size) -> Kernel | None:
        return None if self.stochastic and self.training else super().kernel(shape)


def batch_norm(layer: _BatchNorm, site: str, *, shift: bool) -> nn.Module:
    """`layer` itself, or its shift-based form."""
    return ShiftBatchNorm(layer) if shift else layer


class _Shift(torch.autograd.Function):
    """Of (features, values): (y, mean, variance). The gradient is batch-norm's with the powers of two in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(1, keepdim=True)
        centered = x - mean
        power = ops.ap2(centered)
        variance = (centered * power).mean(1, keepdim=True)
        scale = ops.ap2((variance + eps).rsqrt())
        normal, gamma = centered * scale, ops.ap2(weight)
        ctx.save_for_backward(power, scale, gamma, ops.ap2(normal))
        ctx.mark_non_differentiable(mean, variance)
        return gamma * normal + bias, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        g, (power, scale, gamma, normal) = grads[0], ctx.saved_tensors
        along = power * (power * g).mean(1, keepdim=True) * scale.square()
        dx = gamma * scale * (g - g.mean(1, keepdim=True) - along)
        return dx, (normal * g).sum(1, keepdim=True), g.sum(1, keepdim=True), None


class ShiftBatchNorm(_BatchNorm):
    """Batch-norm without multiplications: each is a shift, by the nearest power of two (`ap2`) of one factor.

    c = x - mean(x), variance = mean(c AP2(c)), x_hat = c AP2(1 / sqrt(variance + eps)), y = AP2(gamma) x_hat + beta,
    over all values of a feature. (N, C), (N, C, L) or (N, C, H, W).

    Gradient, with g = dL/dy, s and c2 the powers of two above: AP2(gamma) s (g - mean(g) - c2 s^2 mean(c2 g)) for x,
    sum(AP2(x_hat) g) for gamma, sum(g) for beta; the paper has none, these are of the authors' Torch code. So is beta,
    which the paper's last line leaves out. The running average is of the variance, theirs of 1 / sqrt(variance).

    Reference: arXiv 1602.02830, Algorithm 3
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        self.load_state_dict(layer.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        columns = x.float().transpose(0, 1).flatten(1)
        weight, bias = self.weight[:, None], self.bias[:, None]
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training:
            y, mean, variance = _Shift.apply(columns, weight, bias, self.eps)  # type: ignore[no-untyped-call]
            self.running_mean.lerp_(mean[:, 0], self.momentum)  # type: ignore[arg-type]
            self.running_var.lerp_(variance[:, 0], self.momentum)  # type: ignore[arg-type]
        else:
            scale = ops.ap2((self.running_var + self.eps).rsqrt())[:, None]
            y = ops.ap2(weight) * (columns - self.running_mean[:, None]) * scale + bias
        return y.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1).to(x.dtype)  # type: ignore[no-any-return]


class ShiftAdaMax(torch.optim.Optimizer):
    """AdaMax whose multiplications and divisions are shifts.

    m <- beta1 m + (1 - beta1) g, v <- max(beta2 v, |g|), w <- w - AP2(lr / (1 - beta1^t)) m / AP2(v). The paper prints
    the shift by 1 - beta1 and explains beta1^t beside it; the bias correction is that of the authors' Torch code.

    Args:
        betas: their complements are powers of two by default, 2^-3 and 2^-10
        eps: the least v

    Reference: arXiv 1602.02830, Algorithm 4
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2**-10,
        betas: tuple[float, float] = (1 - 2**-3, 1 - 2**-10),
        eps: float = 2**-30,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad + group["weight_decay"] * p
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["step"] += 1
                state["m"].lerp_(g, 1 - beta1)
                state["v"] = torch.maximum(beta2 * state["v"], g.abs())
                size = float(ops.ap2(torch.tensor(group["lr"] / (1 - beta1 ** state["step"]))))
                p.addcdiv_(state["m"], ops.ap2(state["v"].clamp_min(group["eps"])), value=-size)
