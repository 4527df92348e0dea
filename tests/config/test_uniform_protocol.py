"""protocol=uniform means the same sites for all methods that are compared: their tables differ in the method alone."""

from typing import Any

import pytest
import torch
import yamls

from qbench.config import catalog
from qbench.data import load
from qbench.quant.layers import quant_layers
from qbench.quant.surgery import activation_quantizers
from qbench.training.build import assemble, make_method, make_model, quantize

METHODS = [m for m in catalog.methods() if m["family"] in ("ptq", "qat")]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
def test_all_layers_but_the_ends_have_their_weights_and_inputs_quantized_and_nothing_else_is(
    method: dict[str, Any],
) -> None:
    """MobileNetV2 has what makes it hard: ReLU6, linear bottlenecks, depthwise layers, sums that no ReLU follows."""
    words = ("model=mobilenet_v2", "model.width=0.25", "dataset=synthetic", "protocol=uniform")
    config = yamls.config_of(f"method={method['name']}", *words)
    data = load(config["dataset"])
    net = make_model(config, data)
    names = [n for n, m in net.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    quantize(config, net, make_method(config))
    layers = dict(quant_layers(net))
    quantized = [n for n, layer in layers.items() if layer.weight_quantizer is not None]
    assert quantized == names[1:-1]
    inputs = [f"{n}.input_quantizer" for n in quantized] if config["a_bits"] < 32 else []
    assert list(activation_quantizers(net)) == inputs


@pytest.mark.parametrize("method", ["pact", "dorefa"])
def test_what_no_relu_precedes_gets_a_grid_of_both_signs(method: str) -> None:
    """In MobileNetV2 the projections end without a ReLU, and the next layer reads them."""
    words = ("model=mobilenet_v2", "model.width=0.25", "dataset=synthetic", "dataset.train_size=64", "budget=smoke")
    config = yamls.config_of(f"method={method}", *words, "device=cpu", "protocol=uniform", "init=scratch")
    net = assemble(config, load(config["dataset"]))
    net.calibrate(net.trainer())
    found = {n: q.signed for n, q in activation_quantizers(net.model).items()}
    expected = {f"{n}.input_quantizer": n.endswith(".body.conv1") or n == "conv2" for n, _ in quant_layers(net.model)}
    assert set(found.values()) == {True, False}
    assert found == expected
