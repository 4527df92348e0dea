"""BinaryConnect: binary weights while propagating, real ones while updating. Reference: arXiv 1511.00363"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qbench.methods.shared.binary import Slope
from qbench.quant import ops
from qbench.quant.grid import Planes, signs
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.packing import Part
from qbench.quant.quantizer import Quantizer, check_bits, check_choice

EVALUATE = ("binary", "real")


def glorot(layer: Any) -> float:
    """sqrt(1.5 / (fan_in + fan_out)), half the bound of Glorot's uniform distribution; 1/39.2 for 3x3 128 -> 128."""
    w = layer.weight
    fan_in, fan_out = w[0].numel(), w.shape[0] // getattr(layer, "groups", 1) * w[0, 0].numel()
    return math.sqrt(1.5 / (fan_in + fan_out))


class BinaryConnect(Quantizer):
    """w_hat = +H or -H. Deterministic: +H where w >= 0. Stochastic: +H with probability p = clip((w/H + 1) / 2, 0, 1).

    The mean of the stochastic w_hat is clip(w, -H, H). The gradient with respect to w_hat goes to w unchanged; with
    `clip_gradients` only where |w| <= H (the closed interval), as Alizadeh et al. (ICLR 2019) try; or times one of the
    slopes of `Slope` at w / H, by `gradient`. `Latents` clips w.

    Stochastic weights are drawn anew for each batch of the training. What is evaluated is `evaluate`, None for real
    where stochastic, else binary:
      binary: the deterministic weights, a net of 1 bit
      real:   the latent weights, as the authors do after stochastic training (Sec. 2.6). Their 8.27 % on CIFAR-10 is of
              such a net, of 32 bits at inference; `stored_bits` says so. `codes` are those of the binary weights.

    Latents start as wide as the paper's U(-H, H): w * (H / sqrt(3)) / rms(w), clipped to -H..H, of the net's own
    initial weights or, which the paper does not do, of a trained float net's.

    Weight: any shape, one H a layer.

    Args:
        h: H, or `glorot` for sqrt(1.5 / (fan_in + fan_out)), as in a version of the released code

    Errors: ValueError on bits other than 1, h not above 0, an unknown `evaluate`.
    Reference: arXiv 1511.00363, Eq. 1-3, Algorithm 1
    """

    told = ("stochastic", "h", "evaluate")

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 1,
        stochastic: bool = False,
        evaluate: str | None = None,
        h: float | str = 1.0,
        clip_gradients: bool = False,
        gradient: str | None = None,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.slope = Slope(gradient or ("clipped" if clip_gradients else "identity"))
        self.evaluate = check_choice("evaluate", evaluate or ("real" if stochastic else "binary"), EVALUATE)
        self.stochastic = stochastic
        self.coefficient = glorot(layer)
        if h == "glorot":
            h = self.coefficient
        if isinstance(h, str) or not h > 0:
            raise ValueError(f"h must be a number above 0 or 'glorot', got {h!r}")
        self.h = float(h)

    def latent(self, weight: Tensor) -> Tensor:
        rms = weight.float().square().mean().sqrt().clamp_min(1e-12)
        return (weight * (self.h / math.sqrt(3) / rms)).clamp(-self.h, self.h)

    def quantize(self, x: Tensor) -> Tensor:
        if self.evaluate == "real" and not self.training:
            return x
        hat = ops.sign_value(x)
        if self.stochastic and self.training:
            u = torch.rand(x.shape, generator=self.generator, device=x.device)
            hat = torch.where(u < (x / self.h + 1) / 2, 1.0, -1.0)  # u in [0, 1) does the clipping
        return self.slope.pass_through(x, self.h * hat, self.h)

    def grid(self, x: Tensor | None = None) -> Planes:
        return signs(1.0 if self.h == 1 else torch.tensor(self.h, device=None if x is None else x.device))

    def stored(self, x: Tensor) -> dict[str, Part]:
        """With evaluate=real the net that is evaluated is one of 32 bits."""
        return super().stored(x) if self.evaluate == "binary" else {"weights": Part(x.detach().float())}

    def coding(self) -> dict[str, str]:
        return super().coding() if self.evaluate == "binary" else {"kind": "floats"}

    def restored(self, parts: dict[str, Part]) -> Tensor:
        return self.codes(parts["weights"].numbers) if "weights" in parts else super().restored(parts)


class Latents(Hook):
    """After each step w <- clip(w_old + c * (w_new - w_old), -H, H) for the latents of BinaryConnect's weights.

    c scales the layer's learning rate behind the optimizer. With k = sqrt(1.5 / (fan_in + fan_out)), c is
      glorot:         1/k, the authors' for Adam, whose steps have one size whatever the gradient's
      glorot_squared: 1/k^2, the paper's for SGD and Nesterov momentum (Sec. 2.5)
      a number:       itself; 1 leaves the learning rate alone

    Args:
        clip: whether to clip: beyond H a weight could no longer make its binary one larger (Sec. 2.4)

    Errors: ValueError on a scale that is neither a name nor above 0.
    Reference: arXiv 1511.00363, Sec. 2.4 and 2.5, Table 1
    """

    def __init__(self, scale: float | str = "glorot", clip: bool = True) -> None:
        super().__init__()
        if isinstance(scale, str):
            check_choice("scale (where it is no number)", scale, ("glorot", "glorot_squared"))
        elif not scale > 0:
            raise ValueError(f"scale must be above 0, glorot or glorot_squared, got {scale!r}")
        self.scale, self.clip = scale, clip
        self.before: list[Tensor] = []

    def factor(self, quantizer: BinaryConnect) -> float:
        """c of a layer."""
        if isinstance(self.scale, str):
            return float(quantizer.coefficient ** (-1 if self.scale == "glorot" else -2))
        return float(self.scale)

    @staticmethod
    def layers(state: State) -> list[tuple[Tensor, BinaryConnect]]:
        found = [(layer.weight, layer.weight_quantizer) for _, layer in quant_layers(state.model)]
        return [(w, q) for w, q in found if isinstance(q, BinaryConnect)]

    def before_step(self, state: State) -> None:
        self.before = [w.detach().clone() for w, _ in self.layers(state)]

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        for (w, q), old in zip(self.layers(state), self.before, strict=True):
            if self.scale != 1:
                w.copy_(old + self.factor(q) * (w - old))
            if self.clip:
                w.clamp_(-q.h, q.h)


class OutputNorm(QuantLayer):
    """The last layer with a batch-norm behind it in place of its bias, as in the authors' nets: sums of +-H are large.

    Its scale and shift start at 1 and 0; `norm` may put another in its place. (N, in) -> (N, classes).

    Errors: ValueError on a layer that is not linear.
    """

    def __init__(self, layer: nn.Linear, site: str, *, norm: Callable[..., nn.Module] | None = None) -> None:
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"the batch-norm behind the output needs a linear layer, got {type(layer).__name__}")
        super().__init__(layer)
        self.bias = None
        plain = nn.BatchNorm1d(layer.out_features)
        self.norm = norm(plain, site) if norm else plain

    def behind(self, y: Tensor) -> Tensor:
        return self.norm(super().behind(y))  # type: ignore[no-any-return]
