"""Passes over data that train nothing: calibration and evaluation, alone or as one of several workers."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.kernels.fuse import fuse
from qbench.quant.layers import quantized_weights
from qbench.quant.passes import calibrating
from qbench.quant.surgery import activation_quantizers


class Batches(Protocol):
    """What the trainer needs of data: see qbench.data."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


def rank() -> int:
    """This process's place among the workers, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of worker processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast where `precision` says so; quantizers compute in float32 all the same.

    On a GPU also whether products of float32 numbers may be rounded to 10 bits (tf32) or not (fp32); torch by itself
    lets convolutions, and nothing else.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def calibrate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, precision: str, scratch: bool
) -> None:
    """Show every activation quantizer the calibration images, with quantized weights and float activations.

    A net that was never trained has no batch-norm statistics: with `scratch` it runs on those of the batch, and its
    buffers are put back afterwards.
    """
    if not activation_quantizers(model):
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if scratch else []
    before = [(b, b.clone()) for m in norms for b in m.buffers(recurse=False)]
    model.train(scratch)
    with calibrating(model), torch.no_grad(), autocast(device, precision), quantized_weights(model):
        for x, _ in batches:
            model(x)
    for buffer, was in before:
        buffer.copy_(was)


def evaluate(model: nn.Module, batches: Batches, device: torch.device, precision: str) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in percent) over all images, counted over all workers."""
    model.eval()
    net = fuse(model)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad(), autocast(device, precision), quantized_weights(model):
        for x, y in batches.epoch(0):
            logits = net(x).float()
            totals[0] += F.cross_entropy(logits, y, reduction="sum")
            totals[1] += (logits.argmax(1) == y).sum()
            totals[2] += len(y)
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, correct, count = totals.tolist()
    return loss / count, 100.0 * correct / count
