"""What the training of low-bit weights is watched by, layer by layer: flips and use of codes, gradients that die."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.layers import quant_layers, quantized_weights
from qbench.quant.method import State
from qbench.quant.quantizer import Quantizer, evaluating
from qbench.quant.surgery import activation_quantizers
from qbench.training.recorder import Recorder, layer_histogram

SATURATED = 0.01  # of the largest gradient in the layer
IMAGES, VALUES = 16, 1 << 16  # that are looked at for the histograms of activations


class Telemetry:
    """Takes stock of every quantized weight at each evaluation, into the recorder.

    Beside the histograms of latent, value and code (`layer_histogram`), per layer and as shares of its codes:
      flips:     those that differ from the ones at the record before (not at the first one)
      entropy:   of the codes, bits per code
      used:      codes in use, of all that the grid has
      saturated: latents whose gradient is below 1 % of the layer's largest: outside the surrogate's window, or pruned
      clipped:   latents that share the layer's lowest or highest value, as those do that a clip has cut
    and scale: mean |w_hat| of the weights that are not quantized to 0, which for two and three levels is their scale

    Only the codes last seen are remembered; `state_dict` puts them into the checkpoint, so that a resumed run records
    what it would have recorded.
    """

    def __init__(self) -> None:
        self.codes: dict[str, Tensor] = {}

    @torch.no_grad()
    def record(self, model: nn.Module, recorder: Recorder, step: int, epoch: float) -> None:
        """Measure every layer with a weight quantizer; a model without one leaves no record."""
        histograms: dict[str, Any] = {}
        measures: dict[str, dict[str, float]] = {}
        for name, layer in quant_layers(model):
            q = layer.weight_quantizer
            if q is None:
                continue
            latent = layer.source().detach()
            with evaluating(q):
                codes, value = q.codes(latent), q(latent)
                histograms[name] = layer_histogram(latent, value, codes, q.levels)
                histograms[name]["latent"]["name"] = q.latent_name
                measures[name] = self._measure(name, q, latent, codes, histograms[name]["codes"])
                measures[name]["scale"] = float(value.float().abs().sum() / value.count_nonzero().clamp(min=1))
        if histograms:
            recorder.histograms(step, epoch, histograms)
            recorder.telemetry(step, epoch, measures)

    def _measure(self, name: str, q: Quantizer, latent: Tensor, codes: Tensor, use: dict[str, Any]) -> dict[str, float]:
        small = codes.to("cpu", torch.uint8 if q.levels <= 256 else torch.int32)
        before, self.codes[name] = self.codes.get(name), small
        found = {} if before is None else {"flips": _share(small != before)}
        found |= {"entropy": use["entropy"], "used": min(1.0, use["distinct"] / q.levels)}
        return found | {"saturated": _share(q.gradient_share(latent) < SATURATED), "clipped": _clipped(latent)}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.codes)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.codes = dict(state)


@torch.no_grad()
def record_activations(model: nn.Module, state: State, recorder: Recorder) -> None:
    """Record what reaches each activation quantizer in evaluation, and what it makes of it: a histogram of each.

    Of `IMAGES` calibration images, and of each layer at most `VALUES` values, evenly chosen. A quantizer that is used
    several times counts where it is used first.
    """
    found: dict[str, Any] = {}
    assert state.calibration is not None

    def look(name: str, q: Quantizer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name not in found and q.enabled:
                x = args[0].detach().float()
                every = -(-x.numel() // VALUES)
                before, after, codes = (t.detach().float().flatten()[::every] for t in (x, out, q.codes(x)))
                found[name] = layer_histogram(before, after, codes, q.levels)
                found[name]["latent"]["name"] = "activation"

        return hook

    quantizers = activation_quantizers(model)
    names = {name: re.sub(r"\.quantizer$|\.input_quantizer$|_quantizer$", "", name) for name in quantizers}
    handles = [q.register_forward_hook(look(names[name], q)) for name, q in quantizers.items()]
    try:
        with evaluating(model), quantized_weights(model):
            for x, _ in state.calibration.epoch(0) if quantizers else ():
                model(x[:IMAGES])
                break
    finally:
        for handle in handles:
            handle.remove()
    if found:
        recorder.histograms(state.step, state.epoch, found, "activations")


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())


def _clipped(x: Tensor) -> float:
    """Share of x at its lowest or its highest value, where several are: one alone was not cut."""
    ends = [int((x == end).sum()) for end in {x.min().item(), x.max().item()}]
    return sum(n for n in ends if n > 1) / x.numel()
