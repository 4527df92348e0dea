"""Batch-norm folded into the layer before it, once, before anything is quantized."""

import torch
from torch import nn

from qbench.quant.layers import QuantLayer


def fold(layer: nn.Conv2d | nn.Linear, site: str, pair: nn.Module | None = None) -> QuantLayer:
    """A QuantLayer with the batch-norm `pair` multiplied into weight and bias; without a pair, just the layer.

    w_fold = gamma w / sqrt(var + eps), b_fold = beta + gamma (b - mean) / sqrt(var + eps), with the running statistics.
    Without it the ranges of the weights mean little: batch-norm scales each channel afterwards. The layer's `moments`
    are what the batch-norm says of its output: mean beta, standard deviation |gamma|.

    Raises:
        ValueError: a pair without running statistics cannot be folded

    Reference: 1712.05877 Eq. 14; 1806.08342 Sec. 3.2.1
    """
    if pair is None:
        return QuantLayer(layer)
    if not isinstance(pair, nn.modules.batchnorm._BatchNorm) or pair.running_mean is None or pair.running_var is None:
        raise ValueError(f"only a batch-norm with running statistics can be folded, got {type(pair).__name__}")
    scale = torch.rsqrt(pair.running_var + pair.eps)
    scale = scale if pair.weight is None else scale * pair.weight
    bias = -pair.running_mean if layer.bias is None else layer.bias - pair.running_mean
    bias = bias * scale if pair.bias is None else bias * scale + pair.bias
    with torch.no_grad():
        layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias = nn.Parameter(bias.detach())
    folded = QuantLayer(layer)
    mean = torch.zeros_like(bias) if pair.bias is None else pair.bias.detach().clone()
    std = torch.ones_like(bias) if pair.weight is None else pair.weight.detach().abs()
    folded.moments = mean, std
    return folded
