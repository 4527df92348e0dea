"""Trained ternary quantization: +Wp, 0, -Wn with learned Wp and Wn. Reference: arXiv 1612.01064"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.quant.grid import Book, book
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Quantizer, check_bits, check_choice

STARTS = ("one", "mean")


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, delta: Tensor, wp: Tensor, wn: Tensor) -> Tensor:
        plus, minus = w > delta, w < -delta
        ctx.save_for_backward(plus, minus, wp, wn)
        return wp * plus - wn * minus

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        plus, minus, wp, wn = ctx.saved_tensors
        g = grads[0]
        slope = torch.where(plus, wp, torch.where(minus, wn, 1.0))
        return g * slope, None, (g * plus).sum(), -(g * minus).sum()


class TTQ(Quantizer):
    """w_hat = +Wp where w > Delta, -Wn where w < -Delta, else 0, with Delta = t * max|w| of the layer.

    With g = dL/dw_hat (Eq. 7 and 8):
      dL/dWp = sum of g over w > Delta
      dL/dWn = -sum of g over w < -Delta      the sign follows from w_hat = -Wn; the paper prints the bare sum
      dL/dw  = Wp * g, 1 * g, Wn * g          where w > Delta, |w| <= Delta, w < -Delta
    Delta gets no gradient; latent weights are not clipped. |w| = Delta is 0. The paper first divides a layer's weights
    by max|w|; Delta relative to the maximum is the same without.

    Weight: any shape, one Wp and one Wn a layer. Two bits a weight, of which three codes are used.

    Args:
        t: threshold, 0..1 (1 excluded)
        sparsity: in place of `t`, the share of weights that is 0 in every layer (Sec. 4), 0..1
        start: Wp and Wn at the start, `one` as in the released code, or the `mean` of |w| on either side

    Errors: ValueError on bits other than 2, t or sparsity out of range, an unknown start.
    Reference: arXiv 1612.01064, Eq. 6-9
    """

    told = ("t", "sparsity")

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float = 2,
        t: float = 0.05,
        sparsity: float | None = None,
        start: str = "one",
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 2, 2)
        for name, value in (("t", t), ("sparsity", sparsity)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
        self.t, self.sparsity = t if sparsity is None else None, sparsity
        self.start = check_choice("start", start, STARTS)
        self.wp, self.wn = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def threshold(self, w: Tensor) -> Tensor:
        """Delta, a 0-dim tensor without gradient."""
        a = w.detach().abs()
        if self.sparsity is None:
            return self.t * a.amax()  # type: ignore[operator]
        zeros = round(self.sparsity * a.numel())
        return a.flatten().kthvalue(zeros).values if zeros else a.new_zeros(())

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        if self.start == "mean":
            w, delta = x.float(), self.threshold(x.float())
            for scale, mask in ((self.wp, w > delta), (self.wn, w < -delta)):
                scale.copy_((w.abs() * mask).sum() / mask.sum().clamp_min(1))

    def quantize(self, x: Tensor) -> Tensor:
        return _Ternary.apply(x, self.threshold(x), self.wp, self.wn)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self, x: Tensor | None = None) -> Book:
        """Codes 0, 1 and 2 are -Wn, 0 and +Wp."""
        return book(torch.stack([-self.wn, torch.zeros_like(self.wp), self.wp]), fixed=(1,))


class PositiveScales(Hook):
    """Keep Wp and Wn at least 1e-3 after each step: a negative one would turn the weights' signs round."""

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        for _, layer in quant_layers(state.model):
            if isinstance(layer.weight_quantizer, TTQ):
                layer.weight_quantizer.wp.clamp_(min=1e-3)
                layer.weight_quantizer.wn.clamp_(min=1e-3)
