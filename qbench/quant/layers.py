"""A conv or linear layer with quantizer slots, and the pass that quantizes all weights of a net at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.quant import ops
from qbench.quant.quantizer import Quantizer


class QuantLayer(nn.Module):
    """A convolution or linear layer around which a weight, input, output and error quantizer may sit.

    `weight` is the latent: what the optimizer trains. It keeps the float layer's key and, unless the quantizer's latent
    has another shape, its shape. Forward: y = op(Q_in(x), Q_w(weight)) + bias; the gradient of y passes through
    Q_error.
    """

    folded_norm: nn.Module | None = None  # the batch-norm whose work the weight and bias of inference do
    moments: tuple[Tensor, Tensor] | None = (
        None  # (mean, std) of each output, where a batch-norm that is gone tells them
    )
    sees_both = False  # whether `forward` reads its input both before and after the input quantizer

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.weight_shape = tuple(layer.weight.shape)
        self.conv = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding, self.dilation, self.groups = (
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            )
        self.weight_quantizer: Quantizer | None = None
        self.input_quantizer: Quantizer | None = None
        self.output_quantizer: Quantizer | None = None
        self.error_quantizer: Quantizer | None = None
        self._weight_hat: Tensor | None = None

    def set_weight_quantizer(self, quantizer: Quantizer) -> None:
        """Attach a weight quantizer; the weight becomes its latent."""
        with torch.no_grad():
            quantizer.calibrate(self.weight)
            quantizer.finish_calibration()
            latent = quantizer.latent(self.weight.detach())
        self.weight = nn.Parameter(latent.clone())
        self.weight_quantizer = quantizer

    def source(self) -> Tensor:
        """What the weight quantizer sees: the latent, or what a layer makes of it."""
        return self.weight

    def inference_bias(self) -> Tensor | None:
        """The bias that inference adds."""
        return self.bias

    def of_inference(self) -> "QuantLayer":
        """A plain layer in its place with the weight and bias of inference, for one that folds its batch-norm.

        The quantizers are shared but for the weight's, which has done its work once it has seen `source`.
        """
        out, channels = self.weight_shape[:2]
        with torch.no_grad():
            weight, bias = self.source(), self.inference_bias()
        plain: nn.Conv2d | nn.Linear
        if self.conv:
            shape = (self.stride, self.padding, self.dilation, self.groups)
            plain = nn.Conv2d(channels * self.groups, out, self.weight_shape[2:], *shape, device="meta")  # type: ignore[arg-type]
        else:
            plain = nn.Linear(channels, out, device="meta")
        plain.weight = nn.Parameter(weight.detach().clone())
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        new = QuantLayer(plain)
        new.input_quantizer, new.output_quantizer = self.input_quantizer, self.output_quantizer
        new.error_quantizer = self.error_quantizer
        return new

    def quantized_weight(self) -> Tensor:
        """The weight on its grid: the one of the net-wide pass where there is one, else computed here."""
        if self._weight_hat is not None:
            return self._weight_hat
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation of this layer."""
        if self.conv:
            shape = (self.stride, self.padding, self.dilation, self.groups)
            return F.conv2d(x, weight, bias, *shape)  # type: ignore[arg-type]
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor, quantized: bool = False) -> Tensor:
        """`quantized`: x has been through the input quantizer (fused with what made it).

        A subclass with a forward of its own takes part in that if it says `sees_both`; then there is a third argument,
        `before`: x as it was before.
        """
        if self.input_quantizer is not None and not quantized:
            x = self.input_quantizer(x)
        return self.behind(self.compute(x))

    def compute(self, x: Tensor) -> Tensor:
        """The layer between its quantizers."""
        return self.apply_op(x, self.quantized_weight(), self.bias)

    def behind(self, y: Tensor) -> Tensor:
        """The error quantizer, then the output quantizer."""
        if self.error_quantizer is not None:
            y = ops.on_backward(y, self.error_quantizer)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def extra_repr(self) -> str:
        return f"{'conv' if self.conv else 'linear'}, weight={list(self.weight_shape)}"


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """(name, layer) of every QuantLayer in `model`, in definition order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, QuantLayer))


@contextmanager
def quantized_weights(model: nn.Module) -> Iterator[None]:
    """Within the block every layer reads weights that were quantized once, class by class, before the forward pass.

    Equal to what each layer would compute alone. A layer that must see batch statistics first sets `alone = True`.
    """
    groups: dict[type[Quantizer], list[QuantLayer]] = {}
    for _, layer in quant_layers(model):
        if layer.weight_quantizer is not None and not getattr(layer, "alone", False):
            groups.setdefault(type(layer.weight_quantizer), []).append(layer)
    try:
        for cls, layers in groups.items():
            quantizers = [layer.weight_quantizer for layer in layers]
            hats = cls.quantize_all([layer.weight for layer in layers], quantizers)  # type: ignore[arg-type]
            for layer, hat in zip(layers, hats, strict=True):
                # a disabled quantizer returns the parameter itself, which must not be registered a second time
                object.__setattr__(layer, "_weight_hat", hat)
        yield
    finally:
        for layers in groups.values():
            for layer in layers:
                layer._weight_hat = None
