"""Small floating-point formats for stored weights: fp16, and FP8 as e4m3 and e5m2."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant.grid import Grid
from qbench.quant.packing import Part
from qbench.quant.quantizer import Quantizer, check_choice


@dataclass(frozen=True)
class Format:
    """Sign, `exponent` bits with this bias, `mantissa` bits; `top` is the greatest finite value.

    infinities: whether the highest exponent is kept for infinity and NaN; else NaN has the highest mantissa of it.
    """

    exponent: int
    mantissa: int
    bias: int
    top: float
    infinities: bool

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def finite(self) -> int:
        """How many codes stand for numbers."""
        return int(2**self.bits - (2 ** (self.mantissa + 1) if self.infinities else 2))

    def power(self, size: Tensor) -> Tensor:
        """2^e of each number of this size, where e is at least that of the subnormals."""
        return torch.ldexp(torch.ones_like(size), (size.frexp().exponent - 1).clamp_min(1 - self.bias))

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest number of the format, half to even; what is too large becomes the greatest."""
        unit = self.power(x.abs()) * 2.0**-self.mantissa
        return ((x / unit).round() * unit).clamp(-self.top, self.top)


FORMATS = {
    "fp16": Format(5, 10, 15, 65504.0, True),
    "e4m3": Format(4, 3, 7, 448.0, False),
    "e5m2": Format(5, 2, 15, 57344.0, True),
}


@dataclass(frozen=True, kw_only=True)
class Floats(Grid):
    """value = scale * the number whose bits (sign, exponent, mantissa, from the highest) are the code."""

    format: Format
    scale: Tensor

    @property
    def levels(self) -> int:
        return self.format.finite

    def values(self, codes: Tensor) -> Tensor:
        f, whole = self.format, codes.to(torch.int64)
        exponent, fraction = whole >> f.mantissa & 2**f.exponent - 1, (whole & 2**f.mantissa - 1).float()
        fraction = fraction * 2.0**-f.mantissa + (exponent > 0)
        size = torch.ldexp(fraction, exponent.clamp_min(1) - f.bias)
        return torch.where(whole >> f.bits - 1 == 1, -size, size) * self.scale

    def codes(self, value: Tensor, source: Tensor) -> Tensor:
        f, x = self.format, self.format.rounded(value / self.scale)
        size, power = x.abs(), self.format.power(x.abs())
        normal = size >= power
        fraction = (size / power - normal.float()) * 2**f.mantissa
        exponent = torch.where(normal, power.frexp().exponent - 1 + f.bias, 0)
        sign = (x < 0).to(torch.int64) << f.bits - 1
        codes: Tensor = sign + (exponent.to(torch.int64) << f.mantissa) + fraction.to(torch.int64)
        return codes.to(torch.int32)

    def tables(self, encoder: bool = False) -> dict[str, Part]:
        return {} if "scale" in self.constants else {"scale": Part(self.scale)}

    def ends(self) -> tuple[Tensor, Tensor]:
        return -self.format.top * self.scale, self.format.top * self.scale


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, form: Format) -> Tensor:
        ctx.save_for_backward(x.abs() <= form.top * scale)
        y: Tensor = form.rounded(x / scale) * scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


class Floating(Quantizer):
    """Weights stored as fp16 or FP8: x_hat = scale * round(x / scale), to the nearest number of the format.

    fp16 has no scale. That of FP8 puts the largest weight, of the layer or of each output channel, on the greatest
    number; it is found once, from the weight. Gradient: 1 up to the greatest number, else 0; none to the scale.

    Args:
        bits: those of the format
        format: fp16 (IEEE 754 half precision) | e4m3 (to 448, no infinity) | e5m2 (to 57344)
        per_channel: a scale for each output channel

    Raises:
        ValueError: an unknown format, or bits that are not its own

    Reference: 2209.05433 (the FP8 formats, and scales for tensors that they do not cover)
    """

    told = ("format",)
    scale: Tensor

    def __init__(self, layer: nn.Module, site: str, *, bits: int, format: str, per_channel: bool = False) -> None:
        super().__init__()
        self.format = check_choice("format", format, tuple(FORMATS))
        self.form = FORMATS[format]
        self.bits = self.form.bits
        if bits != self.bits:
            raise ValueError(f"weights stored as {format} have {self.bits} bits, got {bits}")
        self.per_channel = per_channel and format != "fp16"
        self.granularity = "per_channel" if self.per_channel else "per_tensor"
        weight = layer.weight
        shape = (len(weight), *[1] * (weight.dim() - 1)) if self.per_channel else ()  # type: ignore[arg-type, operator]
        self.register_buffer("scale", torch.ones(shape))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        if self.format != "fp16":
            most = x.flatten(1).abs().amax(1) if self.per_channel else x.abs().amax()
            scale = most.float() / self.form.top
            self.scale.copy_(torch.where(scale > 0, scale, 1.0).reshape(self.scale.shape))

    def quantize(self, x: Tensor) -> Tensor:
        return _Round.apply(x, self.scale, self.form)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Floats:
        constants = ("scale",) if self.format == "fp16" else ()
        return Floats(lo=0, hi=2**self.form.bits - 1, format=self.form, scale=self.scale, constants=constants)
