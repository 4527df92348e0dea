"""Bi-Real Net: the polynomial gradient, the magnitude-aware weights, clip pre-training; slopes for all methods."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from yamls import method_of

from qbench.methods.shared.binary import SLOPES, AnnealSlope, BinaryWeight, HardTanh, Sign, Slope
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import ops, surgery
from qbench.quant.method import Method, State

X = torch.tensor([-1.5, -1.0, -0.75, -0.25, 0.0, 0.5, 1.0, 2.0])


def slope_of(kind: str, x: Tensor = X, **options: float) -> Tensor:
    x = x.clone().requires_grad_()
    y = Sign(nn.Linear(2, 2), "input", gradient=kind, **options)(x)  # type: ignore[arg-type]
    assert y.tolist() == [1.0 if v >= 0 else -1.0 for v in x.tolist()]
    y.sum().backward()
    assert x.grad is not None
    return x.grad


def bireal(**options: object) -> Method:
    conf = OmegaConf.load("conf/method/bireal.yaml")
    assert isinstance(conf, DictConfig)
    conf.w_bits = conf.a_bits = 1
    conf.options.update(options)
    return method_of(conf)


def test_polynomial_gradient() -> None:
    """2 + 2x on [-1, 0), 2 - 2x on [0, 1), 0 outside; sign(0) = +1 is part of `slope_of`."""
    assert slope_of("polynomial").tolist() == [0, 0, 0.5, 1.5, 2, 1, 0, 0]


def test_the_other_slopes() -> None:
    assert slope_of("identity").tolist() == [1] * 8
    assert slope_of("clipped").tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert slope_of("clipped", clip=1.5).tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    torch.testing.assert_close(slope_of("tanh"), 1 - X.tanh() ** 2)  # t = 1 before anything anneals it
    torch.testing.assert_close(slope_of("fourier", torch.zeros(1)), torch.tensor([4 * 0.1 / math.pi * 10]))


@given(st.floats(-4, 4), st.sampled_from(SLOPES))
def test_the_slope_is_even_and_positive_at_zero(x: float, kind: str) -> None:
    slope = Slope(kind)
    a, b = slope(torch.tensor([x, -x])).tolist()
    assert a == pytest.approx(b, abs=1e-6)
    assert float(slope(torch.zeros(()))) >= 1


def test_the_polynomial_is_the_derivative_of_the_quadratic_pieces() -> None:
    x = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)[1::2].requires_grad_()
    clipped = x.clamp(-1, 1)
    pieces = torch.where(x < 0, 2 * clipped + clipped**2, 2 * clipped - clipped**2)
    (want,) = torch.autograd.grad(pieces.sum(), x)
    torch.testing.assert_close(ops.polynomial_slope(x.detach()), want)


@pytest.mark.parametrize(("gradient", "want"), [("constant_alpha", [0.6, 1.2, 0.0]), ("unscaled", [1.0, 2.0, 0.0])])
def test_magnitude_aware_gradient(gradient: str, want: list[float]) -> None:
    """w = (.1, -.2, 1.5): mean|w| = .6; the gradient stops beyond 1."""
    w = torch.tensor([[0.1, -0.2, 1.5]], requires_grad=True)
    y = BinaryWeight(nn.Linear(3, 1), "weight", gradient=gradient)(w)  # type: ignore[arg-type]
    torch.testing.assert_close(y, torch.tensor([[0.6, -0.6, 0.6]]))
    y.backward(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(w.grad, torch.tensor([want]))


def test_weights_take_any_slope() -> None:
    w = torch.tensor([[0.5, -0.5, 2.0, 1.0]])
    for kind, want in (
        ("polynomial", [1.0, 1.0, 0.0, 0.0]),
        ("clipped", [1.0, 1.0, 0.0, 1.0]),
        ("identity", [1.0] * 4),
    ):
        q = BinaryWeight(nn.Linear(4, 1), "weight", gradient="constant_alpha", sign_gradient=kind)  # type: ignore[arg-type]
        x = w.clone().requires_grad_()
        q(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.tensor([want]))  # alpha = 1
        assert q.describe()["sign_gradient"] == kind
    assert "sign_gradient" not in BinaryWeight(nn.Linear(4, 1), "weight").describe()  # type: ignore[arg-type]


def test_hardtanh_counts_both_bounds_as_inside() -> None:
    x = X.clone().requires_grad_()
    y = HardTanh(nn.ReLU(), "replace")(x)
    y.sum().backward()
    assert y.tolist() == X.clamp(-1, 1).tolist()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_before_it_is_binary_an_input_is_clipped() -> None:
    q = Sign(nn.Linear(2, 2), "input", hardtanh=True)  # type: ignore[arg-type]
    q.enabled = False
    assert q(X).tolist() == X.clamp(-1, 1).tolist()
    q = Sign(nn.Linear(2, 2), "input")  # type: ignore[arg-type]
    q.enabled = False
    assert q(X).equal(X)


def test_annealing_is_a_function_of_the_step() -> None:
    net = nn.ModuleList([Slope("tanh"), Slope("fourier"), Slope("polynomial")])
    state, hook = State(net, torch.Generator(), steps=100), AnnealSlope()
    for step, t, terms in ((0, 1e-3, 9), (25, 1e-2, 11), (50, 0.1, 13), (75, 1.0, 16), (99, 10 ** (-3 + 3.96), 18)):
        state.step = step
        hook.before_step(state)
        assert float(net[0].t) == pytest.approx(t)  # type: ignore[arg-type]
        assert int(net[1].terms) == terms  # type: ignore[call-overload]


def test_three_stages() -> None:
    """Real weights and clip, then binary inputs, then both (Sec. 3.3)."""
    assert [(s.name, s.share, [*s.quantize]) for s in bireal().stages] == [
        ("clip", 0.25, []),
        ("binary inputs", 0.25, ["input"]),
        ("binary", None, ["weight", "input", "output", "error"]),
    ]


def test_errors() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="gradient must be one of identity, clipped"):
        Sign(layer, "input", gradient="ste")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 0, got clip=0"):
        Slope("clipped", clip=0)
    with pytest.raises(ValueError, match="t must be two numbers"):
        AnnealSlope(t=[0, 1])
    with pytest.raises(ValueError, match="terms must be two whole"):
        AnnealSlope(terms=[1.5, 2])  # type: ignore[list-item]


def test_yaml_on_a_resnet_trains(still_after_training) -> None:
    method = bireal()
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut="B", shortcut_per_conv=True)
    kept = surgery.quantize(net, method.rules)
    assert {k for k in kept if "shortcut" in k} == {"layer2.0.shortcut.0", "layer3.0.shortcut.0"}
    assert not [n for n, m in net.named_modules() if isinstance(m, nn.ReLU)]
    assert not still_after_training(net, method, torch.optim.Adam(net.parameters(), 1e-3), steps=4)
