"""The gradient through sign, an option of every method that has a sign; Bi-Real Net's test has the slopes by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from yamls import config_of

from qbench.methods.binaryconnect import BinaryConnect
from qbench.methods.bnn import BinaryActivation
from qbench.methods.shared.binary import SLOPES, Slope
from qbench.methods.shared.dorefa_weight import DoReFaWeight
from qbench.quant.layers import quant_layers
from qbench.training.build import make_method, make_model, quantize

BINARY = ["abcnet", "bethge", "binaryconnect", "bireal", "bnn", "bwn", "dorefa", "fda_bnn", "irnet", "reactnet"]
BINARY += ["recu", "xnor"]
NO_SIGN_OF_INPUTS = ("binaryconnect", "bwn", "dorefa")  # DoReFa's 1-bit inputs are rounded to 0 or 1
X = [-1.5, -0.5, 0.25, 1.0]


@pytest.mark.parametrize("method", BINARY)
@pytest.mark.parametrize("gradient", SLOPES)
def test_every_binary_method_takes_every_gradient(method: str, gradient: str) -> None:
    names = ["weight_gradient"] if method in NO_SIGN_OF_INPUTS else ["weight_gradient", "act_gradient"]
    bits = ["bits=1"] if method == "dorefa" else []
    words = [f"method={method}", *bits, "model=resnet20", "model.depth=8", "model.width=0.25", "budget=smoke"]
    config = config_of(*words, *(f"options.{name}={gradient}" for name in names))
    net = make_model(config, SimpleNamespace(channels=3, classes=10, size=8))  # type: ignore[arg-type]
    quantize(config, net, make_method(config))
    of_weights = [layer.weight_quantizer for _, layer in quant_layers(net) if layer.weight_quantizer is not None]
    inside = {m for q in of_weights for m in q.modules() if isinstance(m, Slope)}
    outside = {m for m in net.modules() if isinstance(m, Slope)} - inside
    assert {m.kind for m in inside} == {gradient}
    assert {m.kind for m in outside} == (set() if method in NO_SIGN_OF_INPUTS else {gradient})
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("gradient", "want"), [("identity", [1, 1, 1, 1]), ("clipped", [0, 1, 1, 1]), ("polynomial", [0, 1, 1.5, 0])]
)
def test_the_gradient_by_hand(gradient: str, want: list[float]) -> None:
    """With H = 2 the window of BinaryConnect is twice as wide; DoReFa's mean|w| is a constant."""
    layer = nn.Linear(4, 1)
    for q, scale in (
        (BinaryActivation(nn.ReLU(), "replace", gradient=gradient), 1),
        (BinaryConnect(layer, "weight", gradient=gradient, h=2), 2),  # type: ignore[arg-type]
        (DoReFaWeight(layer, "weight", bits=1, gradient=gradient), 1),
    ):
        x = (scale * torch.tensor(X)).requires_grad_()
        q(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == want


def test_one_bit_alone_has_a_sign() -> None:
    with pytest.raises(ValueError, match=r"weight_gradient=tanh .* w_bits is 2"):
        DoReFaWeight(nn.Linear(4, 1), "weight", bits=2, gradient="tanh")
