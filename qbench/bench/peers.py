"""The same net in other quantization libraries, as their own documentation sets it up; each must be installed."""

import copy
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from qbench.bench.setting import images, plain_step
from qbench.training.build import make_model, place_net

Peer = tuple[Callable[[], None], int, str]  # step, bits, version
BITS = 4


def brevitas(config: dict[str, Any], place: torch.device) -> Peer:
    """Brevitas: QuantConv2d and QuantReLU per tensor, 4 bits; first and last layer in float.

    Its first 300 steps collect statistics and are slower; what is timed is what comes after them.
    """
    import brevitas.nn as qnn

    data, x, y = images(config, place)
    model = make_model(config, data)
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    for name, module in list(model.named_modules()):
        if name in convs and isinstance(module, nn.Conv2d):
            new = qnn.QuantConv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                stride=module.stride,
                padding=module.padding,
                groups=module.groups,
                bias=module.bias is not None,
                weight_bit_width=BITS,
            )
            new.weight = module.weight
            model.set_submodule(name, new)
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            model.set_submodule(name, qnn.QuantReLU(bit_width=BITS))
    place_net(model, place, True).train()
    for module in model.modules():  # past the phase that collects statistics
        if type(module).__name__ == "ParameterFromRuntimeStatsScaling":
            module.collect_stats_steps = 1  # type: ignore[assignment]
    return plain_step(model, x, y, place, "fp32"), BITS, version("brevitas")


def torch_ao(config: dict[str, Any], place: torch.device) -> Peer:
    """torch.ao.quantization: FX graph mode QAT with 4-bit ranges in its fused fake-quantize modules."""
    from torch.ao.quantization import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        QConfig,
        QConfigMapping,
    )
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    data, x, y = images(config, place)
    model = place_net(make_model(config, data), place, True).train()
    levels = 2**BITS
    act = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=levels - 1, dtype=torch.quint8
    )
    weight = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=-levels // 2,
        quant_max=levels // 2 - 1,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = QConfigMapping().set_global(QConfig(activation=act, weight=weight))
        prepared = prepare_qat_fx(copy.deepcopy(model), mapping, (x,))
    return plain_step(prepared, x, y, place, "fp32"), BITS, torch.__version__


def torchao(config: dict[str, Any], place: torch.device) -> Peer:
    """torchao: PT2E QAT with its x86 quantizer, which knows 8 bits only."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    data, x, y = images(config, place)
    model = place_net(make_model(config, data), place, True).train()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (x,)).module()
        prepared = prepare_qat_pt2e(exported, quantizer)
    allow_exported_model_train_eval(move_exported_model_to_train(prepared))
    return plain_step(prepared, x, y, place, "fp32"), 8, version("torchao")


PEERS: dict[str, Callable[[dict[str, Any], torch.device], Peer]] = {
    "brevitas": brevitas,
    "torch.ao": torch_ao,
    "torchao": torchao,
}
WARM = {"brevitas": 3, "torch.ao": 2, "torchao": 2}
