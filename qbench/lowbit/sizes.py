"""What a net takes: five sizes, and the multiplications and bit operations of each layer."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.float_inputs import input_quantizers, layers
from qbench.quant.layers import QuantLayer
from qbench.quant.packing import Part
from qbench.quant.passes import macs
from qbench.quant.quantizer import Quantizer
from qbench.quant.surgery import FLOAT


def sizes(
    model: nn.Module, held: Mapping[Hashable, Part], names: Mapping[Hashable, str], weights: Mapping[str, Any]
) -> dict[str, float]:
    """Four of the five sizes; the fifth is the file's.

    nominal_bits: the bits of the quantizers, the mean over all quantized weights (32 where there are none).
    code_bytes: what stands for the codes. entropy_bytes: the same integers at their entropy (`entropy`).
    bytes: all parts that inference reads. folded_bytes: the same with one 32-bit number per channel for each
    batch-norm, as one that is folded takes: its gain goes into the scale, or the threshold, beside it.
    """
    stored = {part for w in weights.values() for role, part in w["coding"]["parts"].items() if role != "wiring"}
    codes = [part for key, part in held.items() if names[key] in stored]
    counts = [(w["bits"], math.prod(w["shape"])) for w in weights.values()]
    total = sum(n for _, n in counts)
    size = sum(part.size for part in held.values())
    return {
        "nominal_bits": sum(bits * n for bits, n in counts) / total if total else float(FLOAT),
        "code_bytes": sum(part.size for part in codes),
        "entropy_bytes": math.ceil(sum(map(entropy, codes)) / 8),
        "bytes": size,
        "folded_bytes": size - sum(_saved(model, held)),
    }


def entropy(part: Part) -> float:
    """Bits that the integers of a part take at least where each is coded by itself: sum over values v of
    -n_v log2(n_v / n), by width where widths differ. The counts n_v are not counted. Floats are what they are.
    """
    if part.numbers.is_floating_point():
        return float(part.bits)
    numbers = part.numbers.flatten().to(torch.int64)
    widths = torch.as_tensor(part.widths, device=numbers.device).expand(part.numbers.shape).flatten()
    bits = 0.0
    for width in widths.unique():
        counts = numbers[widths == width].unique(return_counts=True)[1].double()
        bits -= float((counts * (counts / counts.sum()).log2()).sum())
    return bits


def _saved(model: nn.Module, held: Mapping[Hashable, Part]) -> list[int]:
    """Bytes that folding each batch-norm of the net saves."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parts = [held[key] for leaf in module.state_dict() if (key := f"{name}.{leaf}") in held]
            if parts:
                found.append(sum(part.size for part in parts) - 4 * module.num_features)
    return found


def costs(model: nn.Module, image: Tensor) -> dict[str, dict[str, Any]]:
    """Of each convolution and linear layer {macs, w_bits, a_bits, bit_operations}, for one image.

    bit_operations = macs * w_bits * a_bits: the products of single bits that the layer's integers are made of. The
    bits are those of a code (planes for sums of signs, the mean where widths are mixed), 32 where weights or inputs
    are float. Of a table's or a power of two's indices it is the same formula, though a look-up or a shift does it.
    """
    inputs, counts, found = input_quantizers(model), macs(model, image), {}
    for name, layer in layers(model).items():
        q = layer.weight_quantizer if isinstance(layer, QuantLayer) else None
        w = width(q) if q is not None and q.coding()["kind"] != "floats" else float(FLOAT)
        a = width(inputs[name]) if name in inputs else float(FLOAT)
        count = counts.get(name, 0)
        found[name] = {"macs": count, "w_bits": w, "a_bits": a, "bit_operations": round(count * w * a)}
    return found


def width(q: Quantizer) -> float:
    """Bits of a code, the mean where they differ; 32 while it is switched off."""
    return torch.as_tensor(q.grid().width).double().mean().item() if q.enabled else float(FLOAT)


def totals(found: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The sums over all layers."""
    return {name: sum(layer[name] for layer in found.values()) for name in ("macs", "bit_operations")}
