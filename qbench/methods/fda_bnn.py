"""FDA-BNN: the gradient of sign from its Fourier series, corrected by a small network. Reference: arXiv 2103.00841"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.methods.shared.binary import Slope
from qbench.quant import ops, quantizer
from qbench.quant.grid import Planes, signs
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Kernel, Quantizer, check_bits, check_choice

SHORTCUTS = {"none": torch.zeros_like, "linear": lambda t: t, "sine": torch.sin}


class Noise(nn.Module):
    """e(t) = relu(t W1) W2 + eta(t), with eta = 0, a t or a sin(t): what the series leaves out. [..., d] -> [..., d].

    W1 is d x h and W2 h x d, h = max(1, d / k); drawn with zero mean.

    Reference: arXiv 2103.00841, Eq. 13
    """

    def __init__(self, d: int, k: int, shortcut: str, a: float) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
        self.shortcut, self.a = check_choice("shortcut", shortcut, tuple(SHORTCUTS)), a
        hidden = max(1, d // k)
        self.fc1, self.fc2 = nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            return self.fc2(self.fc1(t).relu()) + self.a * SHORTCUTS[self.shortcut](t)  # type: ignore[no-any-return]


class FourierSign(nn.Module):
    """sign(t), +1 at 0, with the gradient of z = s_n(t) + alpha e(t); t: [..., d].

    s_n is the Fourier series of sign up to n (`Slope`), e the noise adaptation module. The paper's algorithm 1
    convolves signs alone; its Eq. 14 also has alpha e in the forward pass of the training, which `noise_forward` adds.
    alpha is a 0-dim buffer, which `Fade` brings to 0. In eval mode there is the sign alone, and no stored net has more.

    Reference: arXiv 2103.00841, Eq. 10, 14-17 and Algorithm 1
    """

    training_only = True
    alpha: Tensor

    def __init__(
        self,
        d: int,
        *,
        gradient: str = "fourier",
        omega: float = 0.1,
        noise: bool = True,
        noise_forward: bool = False,
        k: int = 64,
        shortcut: str = "sine",
        a: float = 0.1,
    ) -> None:
        super().__init__()
        self.slope = Slope(gradient, omega=omega)
        self.noise = Noise(d, k, shortcut, a) if noise else None
        self.noise_forward = noise_forward
        self.register_buffer("alpha", torch.tensor(0.1))

    def forward(self, t: Tensor) -> Tensor:
        y: Tensor = self.slope.sign(t)
        if self.noise is None or not self.training or not torch.is_grad_enabled():
            return y
        e: Tensor = self.alpha * self.noise(t)
        return y + (e if self.noise_forward else e - e.detach())


class FourierInput(Quantizer):
    """x_hat = sign(x) with the gradient of `FourierSign`; d is the number of channels, each pixel a vector of its own.

    The paper is silent on what the vector is; a whole image of features would need millions of weights per layer.
    Input: [N, C, H, W] or [N, C]. `options` are those of `FourierSign`.
    """

    def __init__(self, layer: QuantLayer, site: str, *, bits: float = 1, **options: object) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.sign = FourierSign(layer.weight.shape[1] * getattr(layer, "groups", 1), **options)  # type: ignore[arg-type]

    def quantize(self, x: Tensor) -> Tensor:
        return self.sign(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]

    def grid(self, x: Tensor | None = None) -> Planes:
        return signs(1.0, thresholds=0.0)


class FourierWeight(Quantizer):
    """w_hat = E|w| sign(w), one scale per layer, with the gradient of `FourierSign`: dL/dw = g z'(w), no scale in it.

    That is DoReFa's binary weight (arXiv 1606.06160 Eq. 9) with z' in place of its 1. Each output channel's weights are
    a vector, d = weights per channel (the paper is silent). `options` are those of `FourierSign`.
    """

    def __init__(self, layer: QuantLayer, site: str, *, bits: float = 1, **options: object) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.sign = FourierSign(layer.weight[0].numel(), **options)  # type: ignore[arg-type]

    def quantize(self, x: Tensor) -> Tensor:
        z = self.sign(x.flatten(1)).view_as(x)
        return ops.straight_through(z, z.detach() * x.detach().abs().mean())

    def grid(self, x: Tensor | None = None) -> Planes:
        return signs(None if x is None else x.detach().abs().mean())


class PReLU(nn.Module):
    """x where x > 0, else a x with one learned a, initially 0.25: behind each binary conv, as in the released net."""

    def __init__(self, layer: QuantLayer, site: str) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        if quantizer.fast is not None and x.dim() > 1 and quantizer.fast.takes(x):
            zero = torch.zeros(x.shape[1])
            return quantizer.fast.quantize(x, Kernel("prelu", trained=(zero, self.a.expand(len(zero)), zero)))  # type: ignore[no-any-return]
        return F.prelu(x, self.a.to(x.dtype).view(1))


def behind_conv(layer: QuantLayer, site: str, *, prelu: bool = True) -> nn.Module:
    """What follows a binary conv: `PReLU`, or nothing."""
    return PReLU(layer, site) if prelu else nn.Identity()


class Fade(Hook):
    """Bring alpha from its start to 0, linearly in the steps: "gradually", says the paper, and names no start.

    Errors: ValueError on a negative alpha. Reference: arXiv 2103.00841, Sec. 2.3
    """

    def __init__(self, alpha: float = 0.1) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.alpha = alpha

    def before_step(self, state: State) -> None:
        for module in state.model.modules():
            if isinstance(module, FourierSign):
                module.alpha.fill_(self.alpha * (1 - state.training_share))
