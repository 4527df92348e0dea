"""WAGE: training and inference with integers (arXiv 1802.04680)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant import ops
from qbench.quant.grid import Affine, affine
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer, check_bits


def top(bits: int) -> float:
    """1 - sigma, the greatest value on k bits; sigma = 2^(1 - k) is the step (Eq. 2)."""
    return 1 - 2.0 ** (1 - bits)


def on_grid(x: Tensor, bits: int) -> Tensor:
    """Q(x, k) = clip(sigma round(x / sigma), -1 + sigma, 1 - sigma), ties to even; no gradient (Eq. 3)."""
    return (x * 2.0 ** (bits - 1)).round_().mul_(2.0 ** (1 - bits)).clamp_(-top(bits), top(bits))


def shifted(x: Tensor) -> Tensor:
    """x / Shift(max|x|), Shift(m) = 2^round(log2 m): its greatest magnitude is in 0.70..1.42; zeros stay (Eq. 4)."""
    return x / ops.ap2(x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny))


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """1/2 sum (onehot - logits)^2 over classes and batch: a sum, as in the paper; Eq. 9 takes its size away anyway.

    logits: [N, classes], labels: [N]. Gradient logits - onehot. Reference: arXiv 1802.04680, Sec. 3.4
    """
    onehot = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=labels.device)
    return (onehot.to(logits.dtype) - logits).square().sum() / 2


class WithoutBias(QuantLayer):
    """The nets have no biases: their gradients would need the magnitudes of errors, which Eq. 9 takes away."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, site: str) -> None:
        super().__init__(layer)
        self.bias = None


class WageWeight(Quantizer):
    """w_hat = Q(w, k_W) / alpha from the stored weight w, which `IntegerSGD` keeps on k_G bits. Gradient 1 everywhere.

    w starts from U(-L, L), L = max(L_0, L_min), L_0 = sqrt(c / n_in), L_min = beta sigma(k_W), so that not all weights
    are 0 (Eq. 5), put on the grid on which it is stored; n_in are the weights of an output channel. The layer's scale
    is the power of two alpha = max(Shift(L_min / L_0), 1). Eq. 7 has L for L_0, which would make every alpha 1.

    The paper divides the activation by alpha (Eq. 8); a ReLU, a maximum and Eq. 9 and 10 make that the same, bit for
    bit, as dividing the weight.

    Args:
        bits: k_W, 2..8
        stored_bits: k_G
        start_bits: on how many bits the stored weight starts; None: stored_bits. The authors' code starts on k_W
        c, beta: see above. The authors' code has c = 3
        init: where the run starts; a float net has batch-norms and biases, which are missing here

    Raises:
        ValueError: an argument out of its range, or init other than scratch

    Reference: arXiv 1802.04680, Eq. 5-7
    """

    told = ("alpha",)
    latent_name = "stored weight"

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: int,
        stored_bits: int = 8,
        start_bits: int | None = None,
        c: float = 6.0,
        beta: float = 1.5,
        init: str = "scratch",
    ) -> None:
        super().__init__()
        if init != "scratch":
            raise ValueError(f"init must be scratch, as a net without batch-norms and biases has no parent, got {init}")
        if not (c > 0 and beta > 0):
            raise ValueError(f"c and beta must be above 0, got {c=}, {beta=}")
        self.bits = check_bits(bits, 2, 8)
        self.start = check_bits(stored_bits if start_bits is None else start_bits, 2, 16, "start_bits")
        usual, least = math.sqrt(c / math.prod(layer.weight.shape[1:])), beta * 2.0 ** (1 - self.bits)
        self.limit, self.alpha = max(usual, least), max(2.0 ** round(math.log2(least / usual)), 1.0)
        self.idempotent = self.alpha == 1

    def latent(self, weight: Tensor) -> Tensor:
        return on_grid(torch.empty_like(weight).uniform_(-self.limit, self.limit), self.start)

    def quantize(self, x: Tensor) -> Tensor:
        return ops.straight_through(x, on_grid(x.detach(), int(self.bits)) / self.alpha)

    def grid(self, x: Tensor | None = None) -> Affine:
        """alpha follows from the shape of the layer, and is not stored."""
        return _symmetric(int(self.bits), (1 - top(int(self.bits))) / self.alpha)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, error: Quantizer | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bits, ctx.error = bits, error
        return on_grid(x.clamp_min(0), bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        e = grads[0] * (x <= top(ctx.bits))
        return (e if ctx.error is None else ctx.error(e)) * (x > 0), None, None


class WageActivation(Quantizer):
    """In place of a ReLU: Q(max(x, 0), k_A); in the backward pass it quantizes the error. Any shape.

    dx = 1[x > 0] Q_E(1[x <= 1 - sigma] g). Whether the error of a saturated value is 0, and whether Q_E takes its
    maximum over the errors of units that are off too, the paper does not say; both are so in the authors' code.

    Args:
        bits: k_A, 2..16; the codes are 0..2^(k - 1) - 1, as the sign has a bit too
        e_bits: k_E, 2..16; 32 leaves errors in float

    Raises:
        ValueError: an argument out of its range

    Reference: arXiv 1802.04680, Eq. 8-9
    """

    signed = False

    def __init__(self, layer: nn.Module, site: str, *, bits: int, e_bits: int = 8) -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 16)
        self.error_quantizer = None if e_bits == 32 else WageError(layer, "error", bits=e_bits)

    def bypass(self, x: Tensor) -> Tensor:
        return x.relu()

    def quantize(self, x: Tensor) -> Tensor:
        return _Activation.apply(x, int(self.bits), self.error_quantizer)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Affine:
        return affine(1 - top(int(self.bits)), 0, 2 ** (int(self.bits) - 1) - 1)


class WageValue(Quantizer):
    """Values of either sign, the images and the logits: s Q(x / s, k_A), gradient 1 on |x| <= s (1 - sigma), else 0.

    s is 1. With `fit` it is the least power of two that no calibration image exceeds: again 1 for images in -1..1, as
    the paper has them, and what fits for images that are normalized otherwise.

    Args:
        bits: k_A, 2..16
        fit: find s

    Raises:
        ValueError: bits out of range

    Reference: arXiv 1802.04680, Eq. 8, Sec. 4.1
    """

    scale: Tensor

    def __init__(self, layer: nn.Module, site: str, *, bits: int, fit: bool = False) -> None:
        super().__init__()
        self.bits, self.fit, self._most = check_bits(bits, 2, 16), fit, 0.0
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self._most = max(self._most, float(x.abs().amax()))

    def finish_calibration(self) -> None:
        if self.fit and self._most > 0:
            self.scale.fill_(2.0 ** math.ceil(math.log2(self._most)))
        self._most = 0.0

    def quantize(self, x: Tensor) -> Tensor:
        most = self.scale * top(int(self.bits))
        inside = ops.clip(x, -most, most)
        return ops.straight_through(inside, on_grid(inside.detach() / self.scale, int(self.bits)) * self.scale)

    def grid(self, x: Tensor | None = None) -> Affine:
        """The step is stored where it was found, and a constant of the method elsewhere."""
        sigma = 1 - top(int(self.bits))
        return _symmetric(int(self.bits), self.scale * sigma if self.fit else sigma)


class WageError(Quantizer):
    """The error dL/da of a layer: Q(e / Shift(max|e|), k_E), one maximum over the batch, which is not multiplied back.

    Each layer's error thus loses its magnitude, and so does that of each micro-batch and worker. Zeros stay zeros.

    Args:
        bits: k_E, 2..16

    Raises:
        ValueError: bits out of range

    Reference: arXiv 1802.04680, Eq. 4 and 9
    """

    idempotent = False

    def __init__(self, layer: nn.Module, site: str, *, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 16)

    def quantize(self, x: Tensor) -> Tensor:
        return on_grid(shifted(x), int(self.bits))

    def grid(self, x: Tensor | None = None) -> Affine:
        return _symmetric(int(self.bits), 1 - top(int(self.bits)))


def _symmetric(bits: int, step: float | Tensor) -> Affine:
    most = 2 ** (bits - 1) - 1
    return affine(step, -most, most)


class IntegerSGD(torch.optim.Optimizer):
    """The update of weights that are stored on k_G bits, of step sigma = 2^(1 - k_G). There is no float copy of them.

    w <- clip(w - sigma sr(eta g / Shift(max|g|)), -m, m), m = 1 - 2^(1 - clip_bits); sr rounds stochastically, and
    max|g| is that of the layer. eta is a power of two; rates that a schedule puts between two are rounded to the nearer
    one on a logarithmic scale. Numbers are drawn from the run's generator, uniform in float32, as in the authors' code
    (the paper: 16 bits).

    That code clips before a step, on k_W bits, and not after it: quantized weights are the same.

    Args:
        params: parameters or groups; a group may have bits and clip_bits of its own
        lr: eta, a power of two
        bits: k_G, 2..16
        clip_bits: on how many bits the stored weights are clipped; None: bits (Eq. 12). The authors' code has k_W

    Raises:
        ValueError: lr that is no power of two, bits out of range, weight decay

    Reference: arXiv 1802.04680, Eq. 10-12
    """

    recorded = True  # a step of it can be part of a CUDA graph

    def __init__(self, params: Any, lr: float = 1.0, bits: int = 8, clip_bits: int | None = None) -> None:
        if lr <= 0 or math.frexp(lr)[0] != 0.5:
            raise ValueError(f"lr must be a power of two, such as 8, 1 or 0.125, got {lr}")
        super().__init__(params, {"lr": lr, "bits": bits, "clip_bits": clip_bits, "weight_decay": 0.0})
        self.generator: torch.Generator | None = None
        for group in self.param_groups:
            check_bits(group["bits"], 2, 16)
            check_bits(group["clip_bits"] or group["bits"], 2, 16, "clip_bits")
            if group["weight_decay"]:
                raise ValueError(f"weights on a grid are not decayed, got weight_decay={group['weight_decay']}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            sigma, most = 1 - top(group["bits"]), top(group["clip_bits"] or group["bits"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                eta = ops.ap2(torch.as_tensor(group["lr"], device=p.device))
                p.sub_(sigma * ops.stochastic_round(eta * shifted(p.grad), self.generator)).clamp_(-most, most)
                if dist.is_initialized():  # each worker drew its own numbers: the first one's count
                    dist.broadcast(p, 0)
