"""XNOR-Net: binary weights and inputs, the conv's output scaled by K. Reference: arXiv 1603.05279, Sec. 3.2"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.methods.shared.binary import BinaryWeight
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State


class XnorLayer(QuantLayer):
    """y = (sign(x) conv sign(w)) * K * alpha + bias; alpha comes with the weight quantizer, K is computed here.

    K = A conv box, where A = mean over the input channels of |x| and box has the kernel's size and sums to 1: the scale
    of the inputs under each window, of x before its sign. Padding is zeros for sign(x), where they add nothing, and for
    A, where they count, so that K is smaller at the border (the paper is silent; this is its formula with the conv's
    own padding). In a linear layer K = mean|x| of the example; in a grouped conv each group has its own.

    The paper is silent on the gradient through K. By default K is a constant in the backward pass; with `k_gradient` it
    flows (d|x|/dx = sign(x), 0 at 0). Every output channel adds to it, all with the same sign pattern: in the first
    layers of an untrained ResNet-20 it is larger than the gradient through the signs, and training is slower.
    While the input quantizer is disabled the inputs keep their own scale, and K is left out.

    Args:
        k: scale by K, as the paper's text says; the released code does not. The paper puts it at less than a
            point; in a ResNet-20 it costs accuracy (docs/results/first_runs/README.md)

    Reference: arXiv 1603.05279, Eq. 11 and Fig. 2
    """

    sees_both = True  # K is of the inputs before their sign

    def __init__(self, layer: nn.Conv2d | nn.Linear, site: str, *, k: bool = True, k_gradient: bool = False) -> None:
        super().__init__(layer)
        self.k, self.k_gradient = k, k_gradient

    def input_scale(self, x: Tensor) -> Tensor:
        """K in float32: [N, 1, H', W'] ([N, out, H', W'] with groups), or [N, 1] for a linear layer."""
        with torch.autocast(x.device.type, enabled=False):
            a = (x if self.k_gradient else x.detach()).abs()
            if not self.conv:
                return a.mean(-1, keepdim=True, dtype=torch.float32)
            a = a.unflatten(1, (self.groups, -1)).mean(2, dtype=torch.float32)
            height, width = self.weight_shape[2:]
            box = a.new_full((self.groups, 1, height, width), 1 / (height * width))
            k = F.conv2d(a, box, None, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
            return k if self.groups == 1 else k.repeat_interleave(self.weight_shape[0] // self.groups, 1)

    def forward(self, x: Tensor, quantized: bool = False, before: Tensor | None = None) -> Tensor:
        if not self.k or self.input_quantizer is None or not self.input_quantizer.enabled:
            return super().forward(x, quantized)
        signs = x if quantized else self.input_quantizer(x)
        y = self.apply_op(signs, self.quantized_weight(), None)
        y = (y.float() * self.input_scale(x if before is None else before)).to(y.dtype)  # torch is slow at it in bf16
        if self.bias is not None:
            y = y + (self.bias.view(-1, 1, 1) if self.conv else self.bias).to(y.dtype)
        return self.behind(y)


class CenterAndClamp(Hook):
    """After each step, in layers with binary weights: w -= mean over the input channels, then w = clip(w, -1, 1).

    The released code does both, in place; the paper has neither.
    """

    def __init__(self, center: bool = False, clamp: bool = False) -> None:
        super().__init__()
        self.center, self.clamp = center, clamp

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        for _, layer in quant_layers(state.model):
            if isinstance(layer.weight_quantizer, BinaryWeight):
                if self.center:
                    layer.weight.sub_(layer.weight.mean(1, keepdim=True))
                if self.clamp:
                    layer.weight.clamp_(-1, 1)
