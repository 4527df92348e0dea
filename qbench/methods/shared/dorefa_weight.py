"""DoReFa's weights, which PACT uses too: per layer, and those of a whole net at once. Reference: arXiv 1606.06160"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.methods.shared.binary import Slope
from qbench.quant import ops
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Quantizer, check_bits


def _divisor(m: Tensor) -> Tensor:
    """m, or 1 where there is nothing to divide by: a gradient of g / m would throw an all-zero weight out of reach."""
    return torch.where(m < 1e-8, 1.0, m)


class _DoReFaWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, n: int, scale: Tensor, detach: bool) -> Tensor:
        t = w.tanh()
        m = _divisor(t.abs().amax())
        ctx.save_for_backward(t, m, scale)
        ctx.detach = detach
        return ((t / (2 * m) + 0.5) * n).round_().sub_(n / 2).mul_(2 * scale / n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        t, m, scale = ctx.saved_tensors
        g = grads[0] * (scale / m)
        if not ctx.detach:
            top = t.abs() == m
            g = g - top * t.sign() * ((g * t).sum() / m / top.sum().clamp_min(1))
        return g * (1 - t * t), None, None, None


class _DoReFaWeights(torch.autograd.Function):
    """The same for all layers of a net at once: the scales, then the weights; `n` and `detach` of each layer."""

    @staticmethod
    def forward(ctx: Any, n: list[int], detach: list[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        scales, ws = tensors[: len(n)], tensors[len(n) :]
        ts = torch._foreach_tanh(ws)
        ms = _divisor(torch.stack(torch._foreach_max(torch._foreach_abs(ts)))).unbind()
        ctx.save_for_backward(*scales, *ms, *ts)
        ctx.detach = detach
        hats = torch._foreach_div(ts, torch._foreach_mul(ms, 2))
        torch._foreach_add_(hats, 0.5)
        torch._foreach_mul_(hats, n)
        torch._foreach_round_(hats)
        torch._foreach_sub_(hats, [k / 2 for k in n])
        torch._foreach_mul_(hats, [2 * scale / k for scale, k in zip(scales, n, strict=True)])
        return tuple(hats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        count = len(grads)
        scales, ms, ts = (ctx.saved_tensors[i * count : (i + 1) * count] for i in range(3))
        gs = torch._foreach_mul(grads, torch._foreach_div(scales, ms))
        if not all(ctx.detach):
            tops = torch._foreach_trunc(torch._foreach_div(ts, ms))  # the sign where |t| = m, else 0
            sums, counts = ([p.sum() for p in torch._foreach_mul(a, b)] for a, b in ((gs, ts), (tops, tops)))
            shares = torch._foreach_div(sums, torch._foreach_mul(ms, torch._foreach_clamp_min(counts, 1)))
            torch._foreach_mul_(shares, [float(not d) for d in ctx.detach])
            torch._foreach_sub_(gs, torch._foreach_mul(tops, shares))
        slopes = torch._foreach_mul(ts, ts)
        torch._foreach_neg_(slopes)
        torch._foreach_add_(slopes, 1)
        torch._foreach_mul_(gs, slopes)
        return (None, None, *[None] * count, *gs)


@cache
def _layout(sizes: tuple[int, ...], n: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(the layer of each weight of a net in one row, n of each layer), kept on the device."""
    layer = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return layer.to(device), torch.tensor(n, dtype=torch.float32, device=device)


def _in_memory_order(t: Tensor, last: bool) -> Tensor:
    return (t.permute(0, 2, 3, 1) if last else t).reshape(-1)


class _DoReFaWeightsInOneRow(torch.autograd.Function):
    """`_DoReFaWeights` for a GPU: a launch for each operation, not for each layer of it; all with one `detach`."""

    @staticmethod
    def forward(ctx: Any, n: list[int], detach: list[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        scales, ws = torch.stack(tensors[: len(n)]), tensors[len(n) :]
        ctx.detach, ctx.shapes = detach[0], [w.shape for w in ws]
        ctx.last = [w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last) for w in ws]
        ctx.sizes = [w.numel() for w in ws]
        layer, levels = _layout(tuple(ctx.sizes), tuple(n), ws[0].device)
        t = torch.cat(list(map(_in_memory_order, ws, ctx.last))).tanh_()
        m = _divisor(torch.stack(torch._foreach_norm(t.split(ctx.sizes), math.inf)))
        ctx.save_for_backward(t, m, scales, layer)
        row = (t / (2 * m)[layer]).add_(0.5).mul_(levels[layer]).round_()
        return _DoReFaWeightsInOneRow.layers(ctx, row.sub_((levels / 2)[layer]).mul_((2 * scales / levels)[layer]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        t, m, scales, layer = ctx.saved_tensors
        g = torch.cat(list(map(_in_memory_order, grads, ctx.last))).mul_((scales / m)[layer])
        if not ctx.detach:
            top, parts = t.abs() == m[layer], g * t
            # torch sums many tensors at once as norms alone: what is above 0, less what is below
            above, below, count = (
                torch.stack(torch._foreach_norm(x.split(ctx.sizes), 1))
                for x in (parts.clamp_min(0), parts.clamp_max(0), top.to(t.dtype))
            )
            g.sub_(top * t.sign() * ((above - below) / m / count.clamp_min_(1))[layer])
        none = [None] * len(grads)
        return None, None, *none, *_DoReFaWeightsInOneRow.layers(ctx, g.mul_(1 - t * t))

    @staticmethod
    def layers(ctx: Any, row: Tensor) -> tuple[Tensor, ...]:
        """The weights of each layer, in their shape and memory format, as views of the row."""
        parts = []
        for part, shape, last in zip(row.split(ctx.sizes), ctx.shapes, ctx.last, strict=True):
            n, c, h, w = shape if last else (0, 0, 0, 0)
            parts.append(part.view(n, h, w, c).permute(0, 3, 1, 2) if last else part.view(shape))
        return tuple(parts)


class DoReFaWeight(Quantizer):
    """DoReFa weights, per layer; also the weights of PACT.

    bits = 1: w_hat = sign(w) * mean|w| with sign(0) = +1, gradient 1 (the mean is a constant), or that of `gradient`.
    bits > 1: w_hat = scale * (2 Q(tanh(w) / (2 m) + 1/2) - 1), m = max|tanh(w)|, Q(r) = round(n r) / n, n = 2^bits - 1.
    The gradient of Q's round is 1; it flows through tanh and through the division by m: with g = dL/dw_hat,
    dL/dw = scale (1 - tanh^2 w) / m * (g - 1[w is the arg-max] sign(w) sum(g tanh w) / m), the last term shared evenly
    among ties. 2^bits levels, none of them 0. Any shape. For an all-zero weight m is 1: w_hat = scale / n, dL/dw =
    scale g.

    Departure: scale is 1 in the paper and here with init='scratch'. From a float net it is the constant that fits w_hat
    to the float weight in least squares, so that the running statistics of the following batch-norm, and the ranges
    calibrated behind it, are those of the float net. Batch-norm cancels it: dL/dw is the same for any scale.

    Args:
        bits: 1..16
        detach: treat m as a constant in the gradient, as several ports do
        init: 'scratch' for scale = 1, anything else to fit it to the weight
        gradient: of 1-bit weights, one of the slopes of `qbench.methods.shared.binary.Slope`

    Raises:
        ValueError: bits out of range, a gradient for more than one bit

    Reference: 1606.06160 Eq. 7 and 9
    """

    idempotent = False  # tanh / max of a quantized weight is not the value it was quantized to

    scale: Tensor

    def __init__(
        self,
        layer: nn.Module,
        site: str,
        *,
        bits: int,
        detach: bool = False,
        init: str | None = "scratch",
        gradient: str | None = None,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 16)
        self.n = 2**self.bits - 1
        if gradient is not None and self.bits > 1:
            raise ValueError(f"weight_gradient={gradient} is through the sign of 1-bit weights, and w_bits is {bits}")
        self.slope = Slope(gradient or "identity")
        self.detach = detach
        self.init = init
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        if self.bits > 1 and self.init != "scratch":
            w, hat = x.float(), self(x.float())
            share = (w * hat).sum() / (hat * hat).sum()
            if share > 0:  # else the weight is all zeros: any scale fits, and with 0 no gradient would ever come back
                self.scale.mul_(share)

    def quantize(self, x: Tensor) -> Tensor:
        if self.bits == 1:
            return self.slope.pass_through(x, ops.sign_value(x) * x.abs().mean())
        return _DoReFaWeight.apply(x, self.n, self.scale, self.detach)  # type: ignore[no-any-return]

    @classmethod
    def quantize_all(cls, weights: Sequence[Tensor], quantizers: Sequence[Quantizer]) -> list[Tensor]:
        """All layers in one pass; those of one bit, and what is not float32, by themselves."""
        hats: dict[int, Tensor] = {}
        together = []
        for i, (w, q) in enumerate(zip(weights, quantizers, strict=True)):
            if type(q).quantize is DoReFaWeight.quantize and q.bits > 1 and w.dtype == torch.float32:
                together.append((i, w, q))
            else:
                hats[i] = q(w)
        if together:
            index, ws, qs = zip(*together, strict=True)
            options = [q.n for q in qs], [q.detach for q in qs]
            one = ws[0].is_cuda and len(set(options[1])) == 1
            function = _DoReFaWeightsInOneRow if one else _DoReFaWeights
            done = function.apply(*options, *[q.scale for q in qs], *ws)  # type: ignore[no-untyped-call]
            hats.update(zip(index, done, strict=True))
        return [hats[i] for i in range(len(weights))]

    def grid(self, x: Tensor | None = None) -> Affine:
        """Codes 0..n; values = (codes - n/2) * 2 scale / n."""
        if self.bits == 1:
            return affine(None if x is None else 2 * x.detach().abs().mean(), 0, 1, zero=0.5)
        return affine(2 / self.n if self.init == "scratch" else 2 * self.scale / self.n, 0, self.n, zero=self.n / 2)
