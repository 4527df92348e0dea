"""SAWB against numbers worked out by hand, and its coefficients against the best clips of a Gaussian (1807.06964)."""

import math

import pytest
import torch
from torch import nn
from yamls import config_of

from qbench.methods.pact_sawb import COEFFICIENTS, SAWB, WITH_ZERO
from qbench.methods.shared.pact import PACT
from qbench.models.resnet import ResNetCIFAR
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.surgery import activation_quantizers, quantize
from qbench.training.build import make_method

W = torch.tensor([-0.9, -0.4, -0.1, 0.05, 0.2, 0.3, 0.5, 1.1])  # mean|w| 0.44375, rms 0.567065


def sawb(bits: int, **options: object) -> SAWB:
    return SAWB(QuantLayer(nn.Linear(1, 1)), "weight", bits=bits, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "alpha"), [(2, 0.853342), (3, 1.199765), (4, 1.510382)])
def test_the_scale_of_the_worked_example(bits: int, alpha: float) -> None:
    assert sawb(bits).alpha(W).item() == pytest.approx(alpha, abs=1e-5)


def test_two_bits_of_the_worked_example_and_their_gradient() -> None:
    w = W.clone().requires_grad_()
    hat = sawb(2)(w)
    a, b = 0.853342, 0.853342 / 3
    assert hat.tolist() == pytest.approx([-a, -b, -b, b, b, b, b, a], abs=1e-5)
    hat.backward(torch.arange(8.0))
    assert w.grad is not None
    assert w.grad.tolist() == list(range(8))  # straight through, alpha a constant
    w.grad = None
    sawb(2, clip_gradient=True)(w).backward(torch.ones(8))
    assert w.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_three_bits() -> None:
    a = 1.199765  # steps of 2 a / 7 = 0.34279 from -a
    assert sawb(3)(W).tolist() == pytest.approx(
        [a * k / 7 for k in (-5, -3, -1, 1, 1, 1, 3, 7)], abs=1e-5
    )  # w / step + 3.5 = .87, 2.33, 3.2, 3.65, 4.08, 4.38, 4.96, 6.7


def test_a_grid_with_zero() -> None:
    q = sawb(2, zero=True)
    a = 2.6 * 0.567065 - 1.71 * 0.44375  # 0.71556
    assert q(W).tolist() == pytest.approx([-a, -a, 0, 0, 0, 0, a, a], abs=1e-5)
    assert q.codes(W).tolist() == [-1, -1, 0, 0, 0, 0, 1, 1]
    assert (q.levels, sawb(4, zero=True).levels, sawb(8, zero=True).levels, sawb(2).levels) == (3, 15, 255, 4)


def gaussian_error(half: float, steps: float, zero: bool) -> float:
    """Mean squared error of the grid of half-width `half`, by a sum over the density."""
    x = torch.linspace(-8, 8, 64001, dtype=torch.float64)
    place = (x / half).clamp(-1, 1) * steps
    shift = 0.0 if zero else steps
    hat = ((place + shift).round() - shift) * half / steps
    return float(((hat - x).square() * torch.exp(-x * x / 2)).sum() / math.sqrt(2 * math.pi) * (x[1] - x[0]))


@pytest.mark.parametrize(("zero", "bits"), [*((False, b) for b in COEFFICIENTS), *((True, b) for b in WITH_ZERO)])
def test_for_a_gaussian_the_fit_is_near_the_best_clip(zero: bool, bits: int) -> None:
    q = sawb(bits, zero=zero)
    fit = q.c1 + q.c2 * math.sqrt(2 / math.pi)
    best = min(torch.linspace(0.8, 4.5, 75).tolist(), key=lambda half: gaussian_error(half, q.steps, zero))
    assert fit == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_two_valued_weights_have_a_scale_above_zero(bits: int) -> None:
    w = torch.tensor([0.3, -0.3, 0.3, 0.3])  # the formula: 1.056, -0.12 and -0.9 times 0.3
    assert sawb(bits).alpha(w).item() == pytest.approx(0.3 * (1.056 if bits == 2 else 1))
    assert sawb(bits)(w).tolist() == pytest.approx((w * (1.056 if bits == 2 else 1)).tolist())


def test_all_zero_weights_stay_finite() -> None:
    w = torch.zeros(4, requires_grad=True)
    hat = sawb(3, zero=False)(w)
    hat.sum().backward()
    assert hat.isfinite().all()
    assert sawb(2, zero=True)(torch.zeros(4)).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 6}, "2, 3, 4, 5, 8 bits, got 6"),
        ({"bits": 3, "zero": True}, "a grid with 0 has coefficients for 2, 4, 8 bits, got 3"),
        ({"bits": 2, "coefficients": [1.0]}, "two numbers"),
        ({"bits": 2, "coefficients": "ab"}, "two numbers"),
        ({"bits": 9}, "2..8"),
    ],
)
def test_what_has_no_coefficients_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sawb(**options)


def test_own_coefficients_serve_any_width() -> None:
    assert sawb(6, coefficients=[2.0, 0.5]).alpha(W).item() == pytest.approx(2 * 0.567065 + 0.5 * 0.44375, abs=1e-5)


@pytest.mark.parametrize("at_inputs", ["true", "false"])
def test_shortcut_convs_stay_float_and_the_place_of_pact_is_a_choice(at_inputs: str) -> None:
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut="B")
    quantize(net, make_method(config_of("method=pact_sawb", "model=tiny", f"options.at_inputs={at_inputs}")).rules)
    shortcuts = [m for name, m in net.named_modules() if "shortcut" in name and hasattr(m, "stride")]
    assert [type(m) for m in shortcuts] == [nn.Conv2d, nn.Conv2d]
    assert all(isinstance(layer.weight_quantizer, SAWB) for _, layer in quant_layers(net))
    found = activation_quantizers(net)
    assert all(isinstance(q, PACT) for q in found.values())
    assert {name.endswith("input_quantizer") for name in found} == {at_inputs == "true"}
    assert len(found) == (6 if at_inputs == "true" else 7)
