"""What the training of low-bit weights is watched by, layer by layer: flips and use of codes, gradients that die."""

from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.layers import quant_layers
from qbench.quant.quantizer import Quantizer, evaluating
from qbench.training.recorder import Recorder, layer_histogram

SATURATED = 0.01  # of the largest gradient in the layer


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


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())


def _clipped(x: Tensor) -> float:
    """Share of x at its lowest or its highest value, where several are: one alone was not cut."""
    ends = [int((x == end).sum()) for end in {x.min().item(), x.max().item()}]
    return sum(n for n in ends if n > 1) / x.numel()
