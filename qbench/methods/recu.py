"""ReCU: standardized binary weights whose outliers are clamped, so that dead ones revive. arXiv 2103.12369"""

import math

import torch
from torch import Tensor, nn

from qbench.methods.shared.binary import Sign, Slope
from qbench.quant import ops
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Codes, Kernel, Quantizer, check_bits, check_choice

QUANTILES = ("laplace", "empirical")
SCALES = ("mean", "learned")


def _quantiles(z: Tensor, shares: Tensor) -> Tensor:
    """torch.quantile(z, shares), which takes no more than 2^24 values."""
    ordered = z.sort().values
    place = shares.double() * (len(z) - 1)
    below = place.long()
    above = (below + 1).clamp_max(len(z) - 1)
    return ordered[below].lerp(ordered[above], (place - below).to(z.dtype))


class ReCUWeight(Quantizer):
    """w_hat = alpha * sign(v), where v is w standardized and clamped to its quantiles; sign(0) = +1.

      z = (w - mean) / std * sqrt(2) b of each output channel, with b* = `b`: the Laplace distribution of largest
          entropy that the paper settles on; b = None leaves w as it is
      v = min(max(z, Q(1 - tau)), Q(tau)) with the layer's quantiles:
          laplace:   Q(tau) = -Q(1 - tau) = -mean|z| ln(2 - 2 tau)      the maximum-likelihood estimate
          empirical: those of z itself
      alpha = mean|v| of each output channel, a constant in the gradient (the paper is silent on both), or `learned`
          from there, as in the released code (which draws it at random)

    The gradient of the sign is that of `Slope`, by default 1; it is 0 where z lies beyond its quantiles, and flows on
    through the standardization. tau is a 0-dim buffer, which `RaiseTau` moves from 0.85 to 0.99.

    Errors: ValueError on bits other than 1, an unknown option, b not above 0.
    Reference: arXiv 2103.12369, Eq. 6 and 15, Sec. 3.4; the authors' code
    """

    granularity = "per_channel"
    idempotent = False  # a quantized channel is not standardized
    tau: Tensor

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 1,
        gradient: str = "identity",
        b: float | None = 2.0,
        quantile: str = "laplace",
        scale: str = "mean",
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 1)
        self.slope = Slope(gradient)
        if b is not None and not b > 0:
            raise ValueError(f"b must be above 0, or null for no standardization, got {b!r}")
        self.b = b
        self.quantile = check_choice("quantile", quantile, QUANTILES)
        self.scale = check_choice("scale", scale, SCALES)
        shape = (layer.weight.shape[0], *[1] * (layer.weight.dim() - 1))
        self.alpha = nn.Parameter(torch.ones(shape)) if scale == "learned" else None
        self.register_buffer("tau", torch.tensor(0.85))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        if self.alpha is not None:
            self.alpha.copy_(self.magnitude(self.clamped(x.float())))

    def clamped(self, w: Tensor) -> Tensor:
        """v: w standardized and clamped, with its gradient."""
        if self.b is not None:
            dims = tuple(range(1, w.dim()))
            centred = w - w.mean(dims, keepdim=True)
            unbiased = w[0].numel() > 1
            w = centred * (math.sqrt(2) * self.b) / (centred.var(dims, unbiased=unbiased, keepdim=True) + 1e-5).sqrt()
        z = w.detach()
        if self.quantile == "laplace":
            hi = -z.abs().mean() * (2 - 2 * self.tau).log()
            return ops.clip(w, -hi, hi)
        return ops.clip(w, *_quantiles(z.flatten(), torch.stack([1 - self.tau, self.tau])))

    def magnitude(self, v: Tensor) -> Tensor:
        """alpha of each output channel, [out, 1, ...]."""
        return v.detach().abs().mean(tuple(range(1, v.dim())), keepdim=True)

    def quantize(self, x: Tensor) -> Tensor:
        v = self.clamped(x)
        return self.slope.sign(v) * (self.magnitude(v) if self.alpha is None else self.alpha)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Codes:
        """One plane of -1 and +1, with alpha as its coefficient."""
        v = self.clamped(x.float())
        alpha = self.magnitude(v) if self.alpha is None else self.alpha.detach()
        return Codes("planes", ops.sign_value(v).to(torch.int8)[None], {"coefficients": alpha[None]})

    def stored_bits(self, weight: Tensor) -> tuple[float, float]:
        return float(weight.numel()), 32.0 * weight.shape[0]

    def traces(self) -> dict[str, float]:
        return super().traces() | {"tau": float(self.tau)}


class ReCUInput(Sign):
    """The sign of inputs, which in the training are first divided by the standard deviation of their image.

    That changes no sign, but where the gradient through it is large; the released code does it, the paper does not say.
    """

    def __init__(
        self, layer: QuantLayer, site: str, *, bits: float = 1, gradient: str = "polynomial", normalize: bool = False
    ) -> None:
        super().__init__(layer, site, bits=bits, gradient=gradient)
        self.normalize = normalize

    def quantize(self, x: Tensor) -> Tensor:
        if self.normalize and self.training:
            x = x / (x.var(tuple(range(1, x.dim())), keepdim=True) + 1e-5).sqrt()
        return super().quantize(x)

    def kernel(self, shape: torch.Size) -> Kernel | None:
        return None if self.normalize and self.training else super().kernel(shape)


class RaiseTau(Hook):
    """tau = A e^s + B over the share s of the training, from `lo` to `hi`: slowly at first.

    A = (hi - lo) / (e - 1), B = lo - A. The paper moves tau once an epoch, this hook every step.

    Errors: ValueError unless 0.5 < lo <= hi < 1. Reference: arXiv 2103.12369, Eq. 20
    """

    def __init__(self, lo: float = 0.85, hi: float = 0.99) -> None:
        super().__init__()
        if not 0.5 < lo <= hi < 1:
            raise ValueError(f"tau must rise within 0.5..1, got lo={lo} hi={hi}")
        self.lo, self.hi = lo, hi

    def before_step(self, state: State) -> None:
        tau = self.lo + (self.hi - self.lo) * math.expm1(state.training_share) / math.expm1(1)
        for module in state.model.modules():
            if isinstance(module, ReCUWeight):
                module.tau.fill_(tau)
