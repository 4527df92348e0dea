"""bethge, competitive binary nets from scratch: plain signs, the window of the gradient, float downsampling."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from yamls import method_of

from qbench.methods.bethge import SignWeight
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery
from qbench.quant.method import Method

W = torch.tensor([[1.3, -1.31, 0.0], [0.2, -0.3, -0.4]])


def bethge(**options: object) -> Method:
    conf = OmegaConf.load("conf/method/bethge.yaml")
    assert isinstance(conf, DictConfig)
    conf.w_bits = conf.a_bits = 1
    conf.options.update(options)
    return method_of(conf)


def test_signs_without_scale_and_a_wide_window() -> None:
    q = SignWeight(nn.Linear(3, 2), "weight")  # type: ignore[arg-type]
    w = W.clone().requires_grad_()
    hat = q(w)
    assert hat.tolist() == [[1, -1, 1], [1, -1, -1]]
    hat.backward(torch.full((2, 3), 2.0))
    assert w.grad is not None
    assert w.grad.tolist() == [[2, 0, 2], [2, 2, 2]]
    assert q.codes(w).values().equal(hat.detach())
    assert q.stored_bits(w) == (6.0, 0.0)


def test_with_a_scale() -> None:
    """mean|w| = .87 and .3, constants in the gradient."""
    q = SignWeight(nn.Linear(3, 2), "weight", scale=True)  # type: ignore[arg-type]
    w = W.clone().requires_grad_()
    hat = q(w)
    torch.testing.assert_close(hat, torch.tensor([[0.87, -0.87, 0.87], [0.3, -0.3, -0.3]]))
    hat.sum().backward()
    torch.testing.assert_close(w.grad, torch.tensor([[0.87, 0, 0.87], [0.3, 0.3, 0.3]]))
    torch.testing.assert_close(q.codes(w).values(), hat.detach())
    assert q.stored_bits(w) == (6.0, 64.0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="gradient must be one of"):
        SignWeight(nn.Linear(3, 2), "weight", gradient="approxsign")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 0, got clip=-1"):
        SignWeight(nn.Linear(3, 2), "weight", clip=-1)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"scale": True, "act_gradient": "polynomial"}])
def test_yaml_on_a_resnet_trains(changes: dict[str, object], still_after_training) -> None:
    method = bethge(**changes)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut="B", shortcut_per_conv=True)
    kept = surgery.quantize(net, method.rules)
    assert {k for k in kept if "shortcut" in k} == {"layer2.0.shortcut.0", "layer3.0.shortcut.0"}
    assert [n for n, m in net.named_modules() if isinstance(m, nn.ReLU)] == ["layer3.0.relu2"]
    assert (surgery.size(net)["bits_per_weight"] > 1) == bool(changes)
    still = still_after_training(net, method, torch.optim.Adam(net.parameters(), 1e-3))
    assert not still
