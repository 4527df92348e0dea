"""What quantization shifts, put right: biases, from what batch-norms say or from images, and batch-norm statistics.

Reference: 1906.04721 (biases)
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.quant.float_inputs import Tracer
from qbench.quant.layers import QuantLayer, quant_layers, quantized_weights
from qbench.quant.method import Hook, State
from qbench.quant.passes import as_float, visits
from qbench.quant.quantizer import check_choice, evaluating

Moments = tuple[Tensor, Tensor]  # (mean, variance) of each channel, [1, C, 1, 1] or [1, C]
SAME = (nn.Identity, nn.Dropout, nn.AvgPool2d, nn.AdaptiveAvgPool2d)  # of pooling the mean alone is right


def clipped_normal(mean: Tensor, variance: Tensor, bound: Tensor | float = math.inf) -> Moments:
    """(mean, variance) of clip(x, 0, bound) for x ~ N(mean, variance): of a ReLU, or one with a bound.

    Without a bound the mean is std phi(-mean / std) + mean (1 - Phi(-mean / std)).

    Reference: 1906.04721 (the mean)
    """
    std = variance.sqrt().clamp_min(torch.finfo(variance.dtype).tiny)
    bound = torch.as_tensor(bound, dtype=mean.dtype, device=mean.device)
    low, high = -mean / std, (bound - mean) / std

    def phi(z: Tensor) -> Tensor:
        return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    below: Callable[[Tensor], Tensor] = torch.special.ndtr

    top = torch.where(bound.isinf(), 0.0, bound)
    inside, beyond = below(high) - below(low), 1 - below(high)
    first = mean * inside + std * (phi(low) - phi(high)) + top * beyond
    square = (mean.square() + variance) * inside + std * (mean * phi(low) - (mean + top) * phi(high))
    square = square + top.square() * beyond
    return first, (square - first.square()).clamp_min(0)


def input_means(model: nn.Module) -> dict[str, Tensor]:
    """{layer: mean of each channel of its input}, where batch-norms that were folded tell it, data not needed.

    A folded layer's output is N(beta, gamma^2). ReLUs clip it; sums add means, and, as if they were independent (ours),
    variances; ShortcutA and flattening keep them. Behind anything else, as at the image, nothing is known.
    """
    known: dict[str, Moments] = {}
    found = {}
    for node in Tracer().trace(model).nodes:
        if node.op != "call_module":
            continue
        name, module = str(node.target), model.get_submodule(str(node.target))
        inputs = [known.get(n.name) for n in node.all_input_nodes]
        given = [m for m in inputs if m is not None]
        if isinstance(module, QuantLayer) and given:
            found[name] = given[0][0].flatten()
        after = _after(module, given if len(given) == len(inputs) else [])
        if after is not None:
            known[node.name] = after
    return found


def _after(module: nn.Module, given: list[Moments]) -> Moments | None:
    """Moments of what a module gives, from those of all its inputs."""
    if isinstance(module, QuantLayer):
        if module.moments is None:
            return None
        shape = (1, -1, 1, 1) if module.conv else (1, -1)
        mean, std = (t.to(module.weight).reshape(shape) for t in module.moments)
        return mean, std.square()
    if not given:
        return None
    if isinstance(module, SAME) or (isinstance(module, nn.Sequential) and not len(module)):  # a plain shortcut
        return given[0]
    if isinstance(module, (nn.ReLU, nn.ReLU6)):
        return clipped_normal(*given[0], 6.0 if isinstance(module, nn.ReLU6) else math.inf)
    if isinstance(bound := getattr(module, "bound", None), Tensor):
        return clipped_normal(*given[0], bound.reshape(given[0][0].shape))
    if isinstance(module, nn.Flatten) or type(module).__name__ in ("Add", "ShortcutA"):
        return module(*(m[0] for m in given)), module(*(m[1] for m in given))
    return None


def through(layer: QuantLayer, weight: Tensor, means: Tensor) -> Tensor:
    """What a layer with this weight makes, without a bias, of inputs that are everywhere their channel's mean.

    means: [inputs]; a linear layer behind a flattened image has several inputs of each channel.
    """
    groups = layer.groups if layer.conv else 1
    summed = weight.reshape(groups, layer.weight_shape[0] // groups, layer.weight_shape[1], -1).sum(3)
    spread = means.repeat_interleave(summed.shape[0] * summed.shape[2] // len(means))
    return (summed @ spread.reshape(groups, -1, 1)).flatten()


def channel_sums(y: Tensor) -> Tensor:
    """Sum over the images of the mean of each channel of each, in float64."""
    return y.double().flatten(2).mean(2).sum(0) if y.dim() > 2 else y.double().sum(0)


@torch.no_grad()
def output_means(model: nn.Module, names: Iterable[str], batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """{layer: mean of each output channel} over the images of `batches`, in evaluation."""
    sums: dict[str, Tensor] = {}
    count = 0

    def add(name: str, y: Tensor) -> None:
        sums[name] = sums.get(name, 0) + channel_sums(y)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: add(name, y))  # type: ignore[misc]
        for name in names
    ]
    try:
        with evaluating(model), quantized_weights(model):
            for x, _ in batches:
                model(x)
                count += len(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in sums.items()}


class CorrectBias(Hook):
    """Once calibrated, take from each bias what quantization adds to the layer's mean output.

    analytic:  b <- b - (Q(W) - W) E[x], E[x] by the batch-norms before it (`input_means`); a layer whose input nobody
               knows, as that of the first one, stays as it is
    empirical: b <- b - (mean output of the quantized net - that of the float net), of the calibration images, layer by
               layer, those before it being done

    Args:
        how: none | analytic | empirical

    Raises:
        ValueError: another word
        UserError: analytic, and no layer's input is known

    Reference: 1906.04721
    """

    def __init__(self, how: str = "none") -> None:
        super().__init__()
        self.how = check_choice("bias_correction", how, ("none", "analytic", "empirical"))

    @torch.no_grad()
    def after_calibrate(self, state: State) -> None:
        layers = {n: m for n, m in quant_layers(state.model) if m.bias is not None and m.weight_quantizer is not None}
        if self.how == "analytic":
            self._by_norms(state.model, layers)
        elif self.how == "empirical":
            self._by_images(state, layers)

    def _by_norms(self, model: nn.Module, layers: dict[str, QuantLayer]) -> None:
        means = input_means(model)
        if not layers.keys() & means.keys():
            raise UserError(
                "bias_correction=analytic: of no layer do batch-norms tell the input; they must be folded "
                "(options.fold=BatchNorm*), or take bias_correction=empirical"
            )
        for name in layers.keys() & means.keys():
            layer = layers[name]
            assert layer.bias is not None
            layer.bias.sub_(through(layer, layer.quantized_weight() - layer.weight, means[name]))

    def _by_images(self, state: State, layers: dict[str, QuantLayer]) -> None:
        with as_float(state.model):
            float_means = output_means(state.model, layers, state.calibration.epoch(0))
        for name, layer in layers.items():
            seen = [(channel_sums(y), len(y)) for _, y in visits(state.model, layer, state.calibration.epoch(0))]
            now = torch.stack([total for total, _ in seen]).sum(0) / sum(n for _, n in seen)
            assert layer.bias is not None
            layer.bias.sub_((now - float_means[name]).to(layer.bias))


class ReestimateNorms(Hook):
    """Once calibrated, find the statistics of batch-norms again, as the mean over the calibration batches, quantized.

    Args:
        reestimate: whether

    Raises:
        UserError: no batch-norm is left in the net

    Reference: 2203.11086 (there at the end of a training)
    """

    def __init__(self, reestimate: bool = True) -> None:
        super().__init__()
        self.reestimate = reestimate

    @torch.no_grad()
    def after_calibrate(self, state: State) -> None:
        if not self.reestimate:
            return
        found = [m for m in state.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = [m for m in found if m.running_mean is not None]
        if not norms:
            raise UserError(
                "reestimate=true: no batch-norm is left in the net; folded ones have no statistics (fold=null)"
            )
        before = [m.momentum for m in norms]
        try:
            with evaluating(state.model), quantized_weights(state.model):
                for m in norms:
                    m.reset_running_stats()
                    m.momentum = None  # the mean of all batches
                    m.train()
                for x, _ in state.calibration.epoch(0):
                    state.model(x)
        finally:
            for m, momentum in zip(norms, before, strict=True):
                m.momentum = momentum
