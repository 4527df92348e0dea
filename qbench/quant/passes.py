"""A part of a net by itself: in float, while its ranges are set, and what goes into it and comes out of it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.quant.float_inputs import layers
from qbench.quant.layers import QuantLayer, quant_layers, quantized_weights
from qbench.quant.method import SITES
from qbench.quant.quantizer import Quantizer, evaluating
from qbench.quant.surgery import activation_quantizers

ACTIVATIONS = ("input", "output")


def at_site(module: nn.Module, site: str) -> list[Quantizer]:
    """The quantizers of one site in `module`, not what else a slot may hold; one in place of a ReLU is an 'input'."""
    slots = [getattr(layer, f"{site}_quantizer") for _, layer in quant_layers(module)]
    found = [q for q in slots if isinstance(q, Quantizer)]
    if site == "input":
        outputs = {id(q) for q in at_site(module, "output")}
        found = [q for q in activation_quantizers(module).values() if id(q) not in outputs]
    return found


@contextmanager
def as_float(module: nn.Module, sites: Sequence[str] = SITES) -> Iterator[None]:
    """Within the block a net, or one layer or block of it, is float: its quantizers at `sites` are off.

    What stands in place of a ReLU is one. Afterwards each quantizer is on or off as it was before, also where the
    block fails. Weights that the net-wide pass has quantized already are not read.
    """
    before = [(q, q.enabled) for site in sites for q in at_site(module, site)]
    hats = [(layer, layer._weight_hat) for _, layer in quant_layers(module)] if "weight" in sites else []
    try:
        for q, _ in before:
            q.enabled = False
        for layer, _ in hats:
            layer._weight_hat = None
        yield
    finally:
        for q, enabled in before:
            q.enabled = enabled
        for layer, hat in hats:
            object.__setattr__(layer, "_weight_hat", hat)  # see quantized_weights


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Within the block activation quantizers pass on what reaches them and look at it; then they set their ranges."""
    quantizers = activation_quantizers(module).values()
    handles = [q.register_forward_pre_hook(lambda q, args: q.calibrate(args[0].detach().float())) for q in quantizers]
    try:
        with as_float(module, ACTIVATIONS):
            yield
    finally:
        for handle in handles:
            handle.remove()
    for q in quantizers:
        q.finish_calibration()


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set all ranges anew: of weights from the weights, then of activations from images, whose labels are not read."""
    for _, layer in quant_layers(model):
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.calibrate(layer.source())
            layer.weight_quantizer.finish_calibration()
    with evaluating(model), calibrating(model), quantized_weights(model):
        for x, _ in batches:
            model(x)


class _Reached(Exception):
    """A pass has come as far as it is wanted."""


@torch.no_grad()
def visits(
    model: nn.Module, layer: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(what it is given, what it gives) of a layer that runs once in each pass, batch by batch, in evaluation.

    What comes behind it is not computed. The input is what the module is given, before a quantizer that it holds.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def reached(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        found.append((args[0], y))
        raise _Reached

    for x, _ in batches:
        handle = layer.register_forward_hook(reached)
        try:
            with evaluating(model), quantized_weights(model), suppress(_Reached):
                model(x)
        finally:
            handle.remove()
        if not found:
            raise UserError(f"one layer or block at a time: {_named(model, layer)} does not run in a pass")
        yield found.pop()


@torch.no_grad()
def layer_io(model: nn.Module, layer: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(inputs, outputs) of a layer or block of `model` for all images of `batches`, in evaluation; axis 0 is the image.

    The input is what the module is given, before a quantizer that it holds. Both are copies, as a later module may
    work in place. Memory: as large as all of them.

    Errors: UserError where the module does not map one tensor onto one, exactly once in each pass.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    passes = 0

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor):
            raise UserError(f"one layer or block at a time: {_named(model, layer)} must take one tensor as its input")
        inputs.append(args[0].clone())

    handles = [
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(lambda module, args, y: outputs.append(y.clone())),
    ]
    try:
        with evaluating(model), quantized_weights(model):
            for x, _ in batches:
                model(x)
                passes += 1
    finally:
        for handle in handles:
            handle.remove()
    if not passes or len(inputs) != passes:
        raise UserError(
            f"one layer or block at a time: {_named(model, layer)} must run once in each pass, "
            f"but ran {len(inputs)} times in {passes}"
        )
    return torch.cat(inputs), torch.cat(outputs)


@torch.no_grad()
def macs(model: nn.Module, x: Tensor) -> dict[str, int]:
    """{layer: multiplications and additions for one image} of all convolutions and linear layers that run on `x`.

    Each of the outputs of a layer is a sum over the weights of its channel: outputs * weights / channels, padding
    counted. A layer that runs more than once counts as often. x: a batch of one image.
    """
    found: dict[str, int] = {}

    def counting(name: str) -> Any:
        def count(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            shape = layer.weight_shape if isinstance(layer, QuantLayer) else layer.weight.shape
            found[name] = found.get(name, 0) + y.numel() * math.prod(shape[1:])

        return count

    handles = [layer.register_forward_hook(counting(name)) for name, layer in layers(model).items()]
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _named(model: nn.Module, layer: nn.Module) -> str:
    return next((f"'{name}'" for name, m in model.named_modules() if m is layer), f"a {type(layer).__name__} outside")
