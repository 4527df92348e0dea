"""Binary-Weight-Networks: scale, gradients by hand, surgery."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from yamls import method_of

from qbench.methods.shared.binary import BinaryWeight, Sign
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery


def _gradient(mode: str, w: Tensor, g: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    BinaryWeight(nn.Linear(*reversed(w.shape)), "weight", gradient=mode)(w).backward(g)  # type: ignore[arg-type]
    assert w.grad is not None
    return w.grad


@pytest.mark.parametrize(
    ("mode", "want"),
    [
        ("paper", [0.6, 0.0, 0.0, 0.0]),
        ("exact", [0.6, -0.25, 0.25, -0.25]),
        ("constant_alpha", [0.35, 0.0, 0.0, 0.0]),
        ("released", [4 * 0.75 * 0.6, 0.0, 0.0, 0.0]),
    ],
)
def test_worked_example(mode: str, want: list[float]) -> None:
    """W = (.5, -.2, .3, -.4): alpha = 0.35."""
    w = torch.tensor([[0.5, -0.2, 0.3, -0.4]])
    quantizer = BinaryWeight(nn.Linear(4, 1), "weight", gradient=mode)  # type: ignore[arg-type]
    torch.testing.assert_close(quantizer(w), torch.tensor([[0.35, -0.35, 0.35, -0.35]]))
    torch.testing.assert_close(_gradient(mode, w, torch.tensor([[1.0, 0, 0, 0]])), torch.tensor([want]))


@pytest.mark.parametrize(("mode", "at_one"), [("paper", True), ("exact", True), ("released", False)])
def test_saturation_and_the_bound(mode: str, at_one: bool) -> None:
    """w = (1, -2): alpha = 1.5; the bound lies inside for the paper, outside in the released code."""
    got = _gradient(mode, torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 1.0]]))
    if mode == "released":
        got = got / (2 * 0.5)
    from_alpha = {"paper": [0.5, 0.5], "exact": [0.0, 0.0], "released": [0.5, 0.5]}[mode]  # exact: sign . g = 0
    torch.testing.assert_close(got, torch.tensor([[from_alpha[0] + 1.5 * at_one, from_alpha[1]]]))


def test_zero_is_plus_one_and_scales_are_per_filter() -> None:
    w = torch.tensor([[0.0, -1.0], [3.0, 1.0]])
    quantizer = BinaryWeight(nn.Linear(2, 2), "weight")  # type: ignore[arg-type]
    assert quantizer(w).tolist() == [[0.5, -0.5], [2.0, 2.0]]
    assert torch.equal(quantizer.codes(w).values(), quantizer(w))
    assert quantizer.stored_bits(w) == (4.0, 64.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 3.0))
def test_alpha_is_the_least_squares_scale(seed: int, other: float) -> None:
    w = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    hat = BinaryWeight(nn.Conv2d(2, 3, 3), "weight")(w)  # type: ignore[arg-type]
    rival = other * hat
    assert bool(((w - hat).square().flatten(1).sum(1) <= (w - rival).square().flatten(1).sum(1) + 1e-5).all())
    assert all(len(channel.unique()) <= 2 for channel in hat)
    assert torch.equal(BinaryWeight(nn.Conv2d(2, 3, 3), "weight")(hat), hat)  # type: ignore[arg-type]


def test_exact_gradient_is_autograd_of_the_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    w = (0.3 * torch.randn(3, 8, generator=generator)).clamp(-1, 1).requires_grad_()
    g = torch.randn(3, 8, generator=generator)
    alpha, sign = w.abs().mean(1, keepdim=True), torch.where(w >= 0, 1.0, -1.0)
    (want,) = torch.autograd.grad((alpha * sign * g).sum() + (alpha.detach() * w * g).sum(), w)
    torch.testing.assert_close(_gradient("exact", w.detach(), g), want)


def test_errors() -> None:
    layer = nn.Conv2d(1, 4, 3)
    with pytest.raises(ValueError, match=r"1\.\.1, got 2"):
        BinaryWeight(layer, "weight", bits=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient must be one of paper, exact"):
        BinaryWeight(layer, "weight", gradient="ste")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one input channel"):
        BinaryWeight(layer, "weight", gradient="released")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 8"):
        Sign(layer, "input", bits=8)  # type: ignore[arg-type]


def test_yaml_on_a_resnet_trains(still_after_training) -> None:
    conf = OmegaConf.load("conf/method/bwn.yaml")
    conf.w_bits, conf.a_bits, conf.options.first = 1, 32, 1
    method = method_of(conf)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut="B")
    kept = surgery.quantize(net, method.rules)
    assert kept == {"fc": "last layer"}
    assert 1 < surgery.size(net)["bits_per_weight"] < 1.4
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    assert not still_after_training(net, method, optimizer)
